"""RULER's common words: a numbered list in which ten words stand more often than the others.

As in RULER an example with its answer comes first, and how often words are repeated depends on the
length: 30 and 3 times from 4096 tokens on, 6 times and once below. A tokenizer that makes many
tokens of a word, such as bytes, has no room for these at the shortest lengths, where the original
never ends; there the next smaller kind of list is taken for all trials of the length, at last one
without an example. The labels say which one it was. Where a list needs more words than
wonderwords has, pairs such as "quizzical-aardvark" follow, in place of RULER's second list.
"""

import string
from dataclasses import dataclass
from functools import partial

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.prompts import (
    Question,
    Trial,
    check_writes,
    encode,
    encode_prompt,
    text_trial,
)
from memlm.evaluation.tasks.base import PLAIN, PromptTask, Tools
from memlm.evaluation.tasks.ruler import TEMPLATES, largest_fit, match_all
from memlm.evaluation.tasks.words import all_words, word_list

COMMON = 10  # words that are asked for
_LEAST = 2 * COMMON  # different words of a list; as many rare ones as common ones
_SAMPLES = 16  # draws that tell whether a kind of list fits a length
_ATTEMPTS = 64  # draws for a prompt, until its words are short enough
_EXCERPT = 300  # characters


@dataclass(frozen=True)
class ListKind:
    """How often the words of a list are repeated.

    Attributes:
        common: how often each of the ten common words stands in the list.
        rare: how often every other word does.
        example: different words, common and rare repetitions of the example; None = no example.
    """

    common: int
    rare: int
    example: tuple[int, int, int] | None


LONG = ListKind(30, 3, (40, 10, 3))
SHORT = ListKind(6, 1, (20, 3, 1))
SHORTEST = ListKind(3, 1, None)
LONG_FROM = 4096  # tokens


class CommonWords(PromptTask):
    """cwe: the ten most common words of a list."""

    title = "RULER cwe: common words"
    description = (
        "A numbered list of words; the score is the share of the ten most common ones that the "
        "answer contains, in RULER's prompt with one example."
    )
    kind = "shares"

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        prompt = TEMPLATES["common_words_extraction"]
        self.before, self.after = (prompt.template + prompt.answer_prefix).split("{context}")
        self.new_tokens = prompt.tokens_to_generate
        check_writes(tools.tokenizer, string.ascii_lowercase, name)
        self.kinds: dict[int, ListKind] = {}
        self._kind_of(min(tools.config.all_lengths))

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        kind = self._kind_of(length)
        step = max(1, length >> 12)
        for attempt in range(_ATTEMPTS):
            drawn = _List(self, kind, length, index, attempt)
            size = largest_fit(partial(self._tokens, drawn), length, _LEAST, step)
            if size is not None:
                return self._trial(drawn, size)
        raise UserError(
            f"{self.name}: {length} tokens are too short for a list of {_LEAST} words with this "
            f"tokenizer; trial {index} needs {self._tokens(drawn, _LEAST)}"
        )

    def _kind_of(self, length: int) -> ListKind:
        if length not in self.kinds:
            self.kinds[length] = self._choose_kind(length)
        return self.kinds[length]

    def _choose_kind(self, length: int) -> ListKind:
        """The first kind of list that fits whatever words are drawn, as far as samples tell."""
        for kind in (LONG, SHORT, SHORTEST) if length >= LONG_FROM else (SHORT, SHORTEST):
            if self._needed(kind, length) <= length:
                return kind
        # Other lengths have other words, so the length that is named is tried itself.
        least = length
        while (needed := self._needed(SHORTEST, least)) > least:
            least = needed
        raise UserError(
            f"{self.name}: lengths: {length} tokens are too short for a list of {_LEAST} words "
            f"with this tokenizer; use at least {least}"
        )

    def _needed(self, kind: ListKind, length: int) -> int:
        """Tokens of the longest of some of the smallest prompts of a length."""
        drawn = (_List(self, kind, length, index) for index in range(_SAMPLES))
        return max(self._tokens(one, _LEAST) for one in drawn)

    def _tokens(self, drawn: "_List", size: int) -> int:
        """Of the whole prompt with the answer, for a list of `size` different words."""
        text = drawn.context(size) + self.after
        return len(encode_prompt(self.tools.tokenizer, text)) + self._answer_tokens(drawn)

    def _answer_tokens(self, drawn: "_List") -> int:
        """As many as RULER allows; more where a tokenizer needs more for the right answer."""
        answer = encode(self.tools.tokenizer, " " + numbered(drawn.common))
        return max(self.new_tokens, len(answer))

    def _trial(self, drawn: "_List", size: int) -> Trial:
        context = drawn.context(size)
        return text_trial(
            self.tools.tokenizer,
            context,
            [(self.after, drawn.common)],
            self._answer_tokens(drawn),
            {
                "words": size,
                "common": drawn.kind.common,
                "rare": drawn.kind.rare,
                "example": drawn.kind.example is not None,
            },
            f"... {context[-_EXCERPT:]}",
        )

    def score(self, question: Question, prediction: str) -> float:
        return match_all(prediction, question.references)


class _List:
    """What is drawn for one prompt, for any number of words: with more words, the first stay."""

    def __init__(
        self, task: CommonWords, kind: ListKind, length: int, index: int, attempt: int = 0
    ):
        self.task, self.kind, self.place = task, kind, (length, index, attempt)
        rng = task.rng(*self.place)
        self.words = rng.permutation(all_words())
        self.adjectives = rng.permutation(word_list("adjective"))
        self.nouns = rng.permutation(word_list("noun"))
        self.common = self.words[:COMMON].tolist()
        self.example = "" if kind.example is None else self._example(*kind.example, rng)

    def _example(self, size: int, common: int, rare: int, rng: np.random.Generator) -> str:
        words = rng.permutation(all_words())[:size]
        entries = np.repeat(words, [common] * COMMON + [rare] * (size - COMMON))
        answer = numbered(words[:COMMON].tolist())
        context = numbered(rng.permutation(entries).tolist())
        return f"{self.task.before}{context}{self.task.after} {answer}\n"

    def context(self, size: int) -> str:
        """The example and the list of `size` different words, to the end of the list."""
        words = np.array([*self.words[:size].tolist(), *self._pairs(size - len(self.words))])
        repeats = [self.kind.common] * COMMON + [self.kind.rare] * (size - COMMON)
        order = self.task.rng(*self.place, 1)
        entries = order.permutation(np.repeat(words, repeats)).tolist()
        return self.example + self.task.before + numbered(entries)

    def _pairs(self, count: int) -> list[str]:
        """Words such as "quizzical-aardvark", none twice, for more words than English has here."""
        if count > len(self.adjectives) * len(self.nouns):
            raise UserError(f"{self.task.name}: lengths: there are too few words for this length")
        found = []
        for number in range(count):
            round_, adjective = divmod(number, len(self.adjectives))
            noun = (round_ + adjective) % len(self.nouns)
            found.append(f"{self.adjectives[adjective]}-{self.nouns[noun]}")
        return found


def numbered(words: list[str]) -> str:
    """1. word 2. word 3. word"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
