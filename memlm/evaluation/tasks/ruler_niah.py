"""RULER's eight needle tasks: magic numbers hidden in noise, in essays, or among other needles.

A needle is "One of the special magic numbers for KEY is: VALUE."; the question asks for all values
of some keys. Prompts follow the official generator (see `ruler`), with these differences:

- Sentences of an essay end where a word with . ! or ? is followed by a capital letter, a digit or
  a quote, and at blank lines; the official code asks nltk, whose data cannot be had without a
  download.
- The official essays are not contained here. `haystack` takes the official PaulGrahamEssays.json,
  or any text; the default is the standard library's held-out sources.
- The keys and values that are hidden all differ, and no other needle of the haystack has one of
  them; in the official prompts, by chance, one may.
- The size of a prompt goes down to one unit of haystack; the official search starts at 500 words
  or 5 lines and never ends where they do not fit.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.haystack import haystack_documents
from memlm.evaluation.prompts import encode
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, Record, Tools
from memlm.evaluation.tasks.ruler import NOISE, TEMPLATES, Draft, SizedTask, around
from memlm.evaluation.tasks.words import adjective_noun

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
# Percent of the text, in sentences; a needle is put at one of them.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_FILLER_WORDS = 64  # at most, in the place of a needle
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
_SENTENCE_START = re.compile(r"[\"'“‘(\[]*[A-Z0-9]")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_NO_END = re.compile(r"(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|vs|etc|e\.g|i\.e|cf|Fig|No)\.")


@dataclass(frozen=True)
class NiahSetup:
    """One of the eight configurations.

    Attributes:
        title: in reports.
        haystack: "noise", "essay" or "needle" (other needles).
        keys, values: "words", "numbers" or "uuids".
        needle_keys: how many keys are hidden.
        values_per_key: how many values each has.
        queries: how many keys are asked for.
    """

    title: str
    haystack: str
    keys: str = "words"
    values: str = "numbers"
    needle_keys: int = 1
    values_per_key: int = 1
    queries: int = 1


SETUPS = {
    "niah_single_1": NiahSetup("one needle in noise", "noise"),
    "niah_single_2": NiahSetup("one needle in text", "essay"),
    "niah_single_3": NiahSetup("one UUID in text", "essay", values="uuids"),
    "niah_multikey_1": NiahSetup("one of 4 needles in text", "essay", needle_keys=4),
    "niah_multikey_2": NiahSetup("one needle among needles", "needle"),
    "niah_multikey_3": NiahSetup("one UUID among UUIDs", "needle", "uuids", "uuids"),
    "niah_multivalue": NiahSetup("4 values of one key in text", "essay", values_per_key=4),
    "niah_multiquery": NiahSetup("4 keys asked for in text", "essay", needle_keys=4, queries=4),
}


@dataclass(frozen=True)
class _Hidden:
    """A needle of a trial and what stands in its place in the variants."""

    queried: bool
    plain: str
    changed: str
    filler: str

    def text(self, variant: str) -> str:
        if not self.queried:
            return self.plain
        return {CHANGED: self.changed, ABSENT: self.filler}.get(variant, self.plain)


@dataclass(frozen=True)
class _Needles:
    """What is drawn for a trial.

    Attributes:
        keys: those asked for.
        answers, changed_answers: their values, in the order of the keys.
        hidden: the needles in the order of the text.
        places: of the needles, as shares of the text, ascending.
        taken: what stands in no other needle.
    """

    keys: list[str]
    answers: list[str]
    changed_answers: list[str]
    hidden: list[_Hidden]
    places: list[float]
    taken: list[str]


class Essay:
    """Text as words, with the places where sentences start; it repeats behind its end.

    Attributes:
        words: without white space.
        starts: bool [words], whether a sentence starts with the word.
    """

    def __init__(self, paragraphs: Iterable[list[str]]):
        self.words: list[str] = []
        starts: list[bool] = []
        for words in paragraphs:
            self.words += words
            starts.append(True)
            starts += [
                bool(
                    _SENTENCE_START.match(word)
                    and _SENTENCE_END.search(last)
                    and not _NO_END.fullmatch(last)
                )
                for last, word in pairwise(words)
            ]
        self.starts = np.array(starts, dtype=bool)

    def borders(self, size: int) -> np.ndarray:
        """Words before each sentence of the first `size`, and `size`; int64 [sentences + 1]."""
        return np.append(np.flatnonzero(np.resize(self.starts, size)), size)

    def text(self, start: int, stop: int) -> str:
        """Words `start` to `stop`, with a space between two."""
        total = len(self.words)
        parts: list[str] = []
        while start < stop:
            begin = start % total
            parts += self.words[begin : begin + stop - start]
            start += min(total - begin, stop - start)
        return " ".join(parts)


@lru_cache(maxsize=1)
def load_essay(files: tuple[str, ...], words: int) -> Essay:
    """The texts to the paragraph of the word number `words`, or all there are.

    Args:
        files: as in `haystack_documents`.
        words: no more are needed.

    Raises:
        UserError: for a file that is missing, empty, binary or of another layout.
    """
    paragraphs = []
    for paragraph in _paragraphs(files):
        paragraphs.append(paragraph)
        words -= len(paragraph)
        if words <= 0:
            break
    if not paragraphs:
        raise UserError("haystack: the files hold no text")
    return Essay(paragraphs)


def _paragraphs(files: tuple[str, ...]) -> Iterator[list[str]]:
    """Words of each paragraph that has any."""
    for document in haystack_documents(list(files)):
        for paragraph in _BLANK_LINE.split(document):
            if words := paragraph.split():
                yield words


def _random_item(kind: str, rng: np.random.Generator) -> str:
    """A word, a number of 7 digits or a UUID (version 4)."""
    if kind == "words":
        return adjective_noun(rng)
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def niah_template(single: bool) -> tuple[str, str]:
    """What stands before the context and after it, with the answer prefix.

    Args:
        single: one value is asked for; the official words then stand in the singular.
    """
    official = TEMPLATES["niah"]
    template = official.template + official.answer_prefix
    if single:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    before, after = template.split("{context}")
    return before, after


class RulerNiah(SizedTask):
    """niah_single_1..3, niah_multikey_1..3, niah_multivalue and niah_multiquery."""

    variants = (CHANGED, ABSENT)
    new_tokens = TEMPLATES["niah"].tokens_to_generate

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self.setup = setup = SETUPS[name]
        single = setup.queries * setup.values_per_key == 1
        self.title = f"RULER {name}: {setup.title}"
        self.description = (
            f"Needles hidden: {setup.needle_keys * setup.values_per_key}; values asked for: "
            f"{setup.queries * setup.values_per_key}; the score is the share of these that the "
            "answer contains, in RULER's prompt."
        )
        self.kind = "hits" if single else "shares"
        self.before, self.after = niah_template(single)
        self.noun = setup.values.removesuffix("s") if single else setup.values
        self.essay = None
        if setup.haystack == "essay":
            # A word has at least one token. Tasks and lengths share a text of rounded size.
            words = max(1 << 14, max(tools.config.all_lengths) + _FILLER_WORDS).bit_length()
            self.essay = load_essay(tuple(tools.config.haystack), 1 << words)
        self.check_lengths()

    def draft(self, length: int, index: int, variant: str, size: int) -> Draft:
        needles = self._needles(length, index)
        texts = [hidden.text(variant) for hidden in needles.hidden]
        if self.essay is None:
            parts, at, places = self._lines(length, index, needles, texts, size)
            border = "\n"
        else:
            parts, at, places = self._sentences(self.essay, needles, texts, size)
            border = " "
        context = self.before.format(type_needle_v=self.noun) + border.join(parts)
        asked = [number for number, hidden in enumerate(needles.hidden) if hidden.queried]
        behind = sum(len(part) + len(border) for part in parts[at[asked[0]] :]) - len(border)
        start = len(context) - behind
        changed = variant == CHANGED
        return Draft(
            context,
            self.after.format(type_needle_v=self.noun, query=_enumeration(needles.keys)),
            needles.changed_answers if changed else needles.answers,
            {
                "depth": round(places[asked[0]], 1),
                "places": [round(places[number], 4) for number in asked],
                "keys": needles.keys,
            },
            around(context, start, start + len(texts[asked[0]])),
            self._spare(needles, variant),
        )

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        text = self.tools.config.haystack or ["standard library"]
        return {"haystack": text if self.essay else [self.setup.haystack]}

    def _needles(self, length: int, index: int) -> _Needles:
        rng, setup = self.rng(length, index), self.setup
        keys = _distinct(lambda: _random_item(setup.keys, rng), setup.needle_keys)
        count = setup.needle_keys * setup.values_per_key
        drawn = _distinct(lambda: _random_item(setup.values, rng), 2 * count)
        values = np.array(drawn).reshape(2, setup.needle_keys, setup.values_per_key)
        queried = rng.choice(setup.needle_keys, setup.queries, replace=False)
        taken = [f" for {key} is: " for key in keys] + [f" is: {value}." for value in drawn]
        hidden = []
        for number in rng.permutation(count):
            key, value = divmod(int(number), setup.values_per_key)
            plain, changed = (self._needle(keys[key], values[i, key, value]) for i in (0, 1))
            filler = self._filler(rng, plain, length, taken)
            hidden.append(_Hidden(key in queried, plain, changed, filler))
        if setup.haystack == "essay":
            places = rng.choice(DEPTHS, count, replace=False) / 100
        else:
            places = rng.random(count)
        return _Needles(
            [keys[key] for key in queried],
            values[0, queried].ravel().tolist(),
            values[1, queried].ravel().tolist(),
            hidden,
            np.sort(places).tolist(),
            taken,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.setup.values, key=key, value=value)

    def _random_needle(self, rng: np.random.Generator, taken: list[str]) -> str:
        """A needle of the haystack, with no part that is `taken`."""
        while True:
            key, value = (_random_item(kind, rng) for kind in (self.setup.keys, self.setup.values))
            needle = self._needle(key, value)
            if not any(part in needle for part in taken):
                return needle

    def _filler(self, rng: np.random.Generator, needle: str, length: int, taken: list[str]) -> str:
        """What stands where a needle is left out: of the haystack's kind."""
        if self.setup.haystack == "noise":
            return NOISE
        if self.essay is None:
            return self._random_needle(rng, taken)
        # Of the words that every config with this length loads.
        start = int(rng.integers(length))
        text = self.essay.text(start, start + needle.count(" ") + 1)
        # Not longer than the needle, but for a single long word.
        return text[: len(needle)].rpartition(" ")[0] if len(text) > len(needle) else text

    def _lines(
        self, length: int, index: int, needles: _Needles, texts: list[str], size: int
    ) -> tuple[list[str], list[int], list[float]]:
        """`size` lines with the needles between them, which of the parts are the needles, and
        where those are as shares of the lines."""
        if self.setup.haystack == "noise":
            parts = [NOISE] * size
        else:
            rng = self.rng(length, index, 1)
            parts = [self._random_needle(rng, needles.taken) for _ in range(size)]
        lines = [int(place * size) for place in needles.places]
        for line, text in zip(reversed(lines), reversed(texts), strict=True):
            parts.insert(line, text)
        at = [line + number for number, line in enumerate(lines)]
        return parts, at, [line / size for line in lines]

    def _sentences(
        self, essay: Essay, needles: _Needles, texts: list[str], size: int
    ) -> tuple[list[str], list[int], list[float]]:
        """As `_lines`, for `size` words; a needle stands between two sentences."""
        borders = essay.borders(size)
        sentences = len(borders) - 1
        cuts = [int(borders[int(sentences * place)]) for place in needles.places]
        parts = []
        for start, stop, text in zip([0, *cuts], cuts, texts, strict=False):
            parts += [essay.text(start, stop), text]
        parts.append(essay.text(cuts[-1], size))
        return parts, list(range(1, len(parts), 2)), needles.places

    def _spare(self, needles: _Needles, variant: str) -> int:
        """Tokens by which the longest variant is longer than this one, but for the borders."""
        tokenizer = self.tools.tokenizer
        tokens = {
            one: sum(len(encode(tokenizer, hidden.text(one))) for hidden in needles.hidden)
            for one in (PLAIN, *self.variants)
        }
        return max(tokens.values()) - tokens[variant]


def _enumeration(keys: list[str]) -> str:
    """One key alone, or a list such as "a, b, and c"."""
    return ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
