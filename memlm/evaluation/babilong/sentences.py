"""Places between the sentences of a long text, found in tokens around a wanted place."""

import re
from collections.abc import Callable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.tokenizers import byte_level
from memlm.evaluation.prompts import encode

_WINDOWS = (256, 4096)  # tokens that are looked at, first a few, then more
_BEFORE = 8  # further tokens in front, that show a title such as "Mr." whole
_SENTENCE = re.compile(
    # A full stop that no title or initial ends in, and no small letter behind it; or a blank line.
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"'”’)\]]*(?=\s+[^\sa-z])"
    r"|\S(?=[ \t]*\n[ \t]*\n)",
    re.ASCII,  # bytes of other characters are no space
)
# Texts without sentences have lines, and texts without lines have words.
_LINE, _WORD = re.compile(r"\S(?=[ \t]*\n)", re.ASCII), re.compile(r"\S(?=\s)", re.ASCII)
_ENDS = (_SENTENCE, _LINE, _WORD)


class Sentences:
    """Ends of sentences in token ids of one tokenizer.

    BABILong splits all of its book with NLTK. Here only the text around a place is decoded, so
    that a text of millions of tokens can stay on disk.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.bytes = byte_level(tokenizer)
        # A tokenizer may drop the space that starts a text, so every token follows a letter.
        self.anchor = [] if self.bytes else encode(tokenizer, "a").tolist()
        self.skip = len(self._decode([]))
        self.texts: dict[int, str] = {}

    def end_near(
        self, read: Callable[[int, int], np.ndarray], place: int, start: int, stop: int
    ) -> int:
        """The first end of a sentence from `place` on, else the last one before it.

        Where a text has none within 4096 tokens, the end of a line or of a word serves, and where
        it has none of those either, `place` itself.

        Args:
            read: gives the ids from one place to another.
            place: in tokens, from `start` to `stop`.
            start, stop: bounds of the answer; `start` itself counts as the end of a sentence.
        """
        if place <= start:
            return start
        for pattern in _ENDS:
            for window in _WINDOWS:
                begin, end = max(start, place - _BEFORE), min(stop, place + window)
                for cut in self._ends(read(begin, end), pattern):
                    if begin + cut >= place:
                        return begin + cut
            for window in _WINDOWS:
                begin = max(start, place - window)
                cuts = [0] if begin == start else []
                cuts += self._ends(read(begin, place), pattern)
                if cuts:
                    return begin + cuts[-1]
        return place

    def leading_space(self, ids: np.ndarray) -> int:
        """How many tokens at the front of `ids` are nothing but space."""
        texts = self._split(ids)
        return next((count for count, text in enumerate(texts) if text.strip()), len(texts))

    def _ends(self, ids: np.ndarray, pattern: re.Pattern) -> Iterator[int]:
        """Ascending numbers of leading tokens that end where `pattern` does, or in space after."""
        texts = self._split(ids)
        ends = np.cumsum([len(text) for text in texts])
        whole = "".join(texts)
        for match in pattern.finditer(whole):
            token = int(np.searchsorted(ends, match.end()))
            if not whole[match.end() : ends[token]].strip():
                yield token + 1

    def _split(self, ids: np.ndarray) -> list[str]:
        """The text of every token; one character per byte."""
        if self.bytes:
            return list(bytes(ids.astype(np.uint8)).decode("latin-1"))
        for index in set(ids.tolist()) - self.texts.keys():
            self.texts[index] = self._decode([index])[self.skip :]
        return [self.texts[index] for index in ids.tolist()]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([*self.anchor, *ids], skip_special_tokens=True)
