"""Pass key retrieval: a number hidden in a few sentences that repeat without end.

Definition and wording are those of Mohtashami and Jaggi, "Landmark Attention: Random-Access
Infinite Context Length for Transformers" (2023), arXiv:2305.16300, as in their repository (see
NOTICE): five lines, the task, garbage, the key, garbage, the question. Garbage is cut by
characters; the share of it before the key is uniform, the key uniform in 1 .. 50000. The first
number of the answer counts.

There, prompts have given numbers of characters of garbage. Here they have given numbers of
tokens, and the garbage is as long as fits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.errors import UserError
from memlm.evaluation.prompts import (
    Context,
    Question,
    Trial,
    check_writes,
    encode_prompt,
    split_prompt,
)
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, PromptTask, Record, Tools

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50000
NEW_TOKENS = 10

_PERIOD = len(GARBAGE) + 1  # characters after which the garbage repeats
_KEPT = 4  # periods that are tokenised, together with the rest that is none
_ROWS = 10  # of a heatmap
_EXCERPT = 200  # characters shown on each side of the key


def garbage(characters: int) -> str:
    """The first `characters` of the endlessly repeated garbage."""
    return ((GARBAGE + " ") * (characters // _PERIOD + 1))[:characters]


def prompt_text(key: int | None, before: int, after: int) -> tuple[str, str]:
    """Context and question; together the official prompt.

    Args:
        key: the pass key; None = a prompt without the line that tells it.
        before, after: characters of garbage before and after that line.
    """
    hidden = [] if key is None else [INFORMATION.format(key=key)]
    lines = [TASK, garbage(before), *hidden, garbage(after)]
    return "\n".join(lines), "\n" + QUESTION


@dataclass(frozen=True)
class Repeated:
    """A piece of a context: the same token ids `times` times."""

    ids: np.ndarray
    times: int

    def __len__(self) -> int:
        return len(self.ids) * self.times

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[np.arange(start, stop) % max(len(self.ids), 1)].astype(np.int64)


@dataclass(frozen=True)
class Prompt:
    """A context as pieces, and the token ids of the question, int64."""

    pieces: tuple[Repeated, ...]
    question: np.ndarray

    def __len__(self) -> int:
        return sum(map(len, self.pieces)) + len(self.question)


def encode_passkey(
    tokenizer: PreTrainedTokenizerBase, key: int | None, before: int, after: int
) -> Prompt:
    """Token ids of `prompt_text`, without writing out a long one.

    Of long garbage, all but a few periods are left out of the text and put back as copies of the
    ids by which one period more lengthens the prompt. Whether copies are what the tokenizer makes
    of a longer text is checked with two periods more on both sides; a prompt for which they are
    not is tokenised whole.
    """
    copies = [max(0, size // _PERIOD - _KEPT) for size in (before, after)]
    rest = [size - times * _PERIOD for size, times in zip((before, after), copies, strict=True)]
    short = prompt_text(key, *rest)
    context, (question,) = split_prompt(tokenizer, short[0], [short[1]])
    if any(copies):
        folded = np.concatenate([context, question])
        first, second = (
            _insertion(
                folded,
                _whole(tokenizer, key, rest[0] + more, rest[1] + _PERIOD - more),
                len(context),
            )
            for more in (_PERIOD, 0)
        )
        if first and second and first[0] <= second[0]:
            (start, one), (middle, two) = first, second

            def unfold(times: Sequence[int]) -> tuple[Repeated, ...]:
                return (
                    Repeated(context[:start], 1),
                    Repeated(one, times[0]),
                    Repeated(context[start:middle], 1),
                    Repeated(two, times[1]),
                    Repeated(context[middle:], 1),
                )

            longer = _whole(tokenizer, key, *(size + 2 * _PERIOD for size in rest))
            ids = Context(unfold((2, 2))).read(0, len(longer))
            if np.array_equal(np.concatenate([ids, question]), longer):
                return Prompt(unfold(copies), question)
        written = prompt_text(key, before, after)
        context, (question,) = split_prompt(tokenizer, written[0], [written[1]])
    return Prompt((Repeated(context, 1),), question)


def _whole(
    tokenizer: PreTrainedTokenizerBase, key: int | None, before: int, after: int
) -> np.ndarray:
    return encode_prompt(tokenizer, "".join(prompt_text(key, before, after)))


def _insertion(short: np.ndarray, long: np.ndarray, latest: int) -> tuple[int, np.ndarray] | None:
    """Where ids were inserted into `short` to make `long`, and which; None if it is more.

    Of all places that are right, the last one that is not behind `latest`.
    """
    more = len(long) - len(short)
    if more <= 0:
        return None
    differs = np.flatnonzero(short != long[: len(short)])
    place = min(int(differs[0]) if len(differs) else len(short), latest)
    if not np.array_equal(short[place:], long[place + more :]):
        return None
    return place, long[place : place + more]


class Passkey(PromptTask):
    """Pass keys at uniform places in repeated sentences."""

    title = "Pass key"
    description = (
        "A number between 1 and 50000 hides in sentences that repeat; the first number of the "
        "answer has to be the same. Keys stand at any depth, so some within attention's reach."
    )
    variants = (CHANGED, ABSENT)

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        check_writes(tools.tokenizer, "0123456789", name)
        self.sizes: dict[tuple[int, int], int] = {}
        rng = np.random.default_rng(0)
        keys = [LARGEST_KEY, *rng.integers(10_000, LARGEST_KEY, size=32).tolist()]
        self.least = self._tokens(keys, 0, 0.0) + NEW_TOKENS
        for length in tools.config.all_lengths:
            self._check(length, self.least)

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        rng = self.rng(length, index)
        key = int(rng.integers(1, LARGEST_KEY + 1))
        other = (key - 1 + int(rng.integers(1, LARGEST_KEY))) % LARGEST_KEY + 1
        place = float(rng.random())
        if (length, index) not in self.sizes:
            self.sizes[length, index] = self._garbage_for(length, [key, other], place)
        total = self.sizes[length, index]
        before = int(place * (total + 1))
        asked = other if variant == CHANGED else key
        hidden = None if variant == ABSENT else asked
        prompt = encode_passkey(self.tools.tokenizer, hidden, before, total - before)
        share = before / max(total, 1)
        labels = {
            "depth": round((min(int(share * _ROWS), _ROWS - 1) + 0.5) / _ROWS, 2),
            "characters_before": before,
            "characters_after": total - before,
        }
        lines = [garbage(before)[-_EXCERPT:], garbage(total - before)[:_EXCERPT]]
        if hidden is not None:
            lines.insert(1, INFORMATION.format(key=hidden))
        return Trial(
            Context(prompt.pieces),
            (Question(prompt.question, (str(asked),), NEW_TOKENS),),
            labels,
            "\n".join(lines),
        )

    def score(self, question: Question, prediction: str) -> float:
        found = re.search(r"\d+", prediction)
        return float(found is not None and int(found.group()) == int(question.references[0]))

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"chance": 1 / LARGEST_KEY}

    def _garbage_for(self, length: int, keys: list[int], place: float) -> int:
        """The most characters of garbage with which every key's prompt fits into `length`."""
        budget = length - NEW_TOKENS
        fixed = self._tokens(keys, 0, place)
        self._check(length, fixed + NEW_TOKENS)
        # Tokens grow by the same number with each period, but for those that a cut splits.
        sample = 64 * _PERIOD
        growth = (self._tokens(keys, sample, place) - fixed) / sample
        guess = int((budget - fixed) / growth)
        low, high = max(0, guess - _PERIOD), guess + _PERIOD
        while low > 0 and self._tokens(keys, low, place) > budget:
            low, high = max(0, low - 2 * (high - low)), low
        while self._tokens(keys, high, place) <= budget:
            low, high = high, high + 2 * (high - low)
        while high - low > 1:
            middle = (low + high) // 2
            if self._tokens(keys, middle, place) <= budget:
                low = middle
            else:
                high = middle
        return low

    def _tokens(self, keys: Sequence[int], total: int, place: float) -> int:
        """Tokens of the longest of the keys' prompts, without the answer."""
        before = int(place * (total + 1))
        return max(
            len(encode_passkey(self.tools.tokenizer, key, before, total - before)) for key in keys
        )

    def _check(self, length: int, least: int) -> None:
        if length < least:
            raise UserError(
                f"{self.name}: lengths: {length} tokens are too short for a pass key and its "
                f"question; use at least {least}"
            )
