"""RULER's variable tracking: names that are assigned to each other, all worth the same number.

Five lines "VAR X = 12345", "VAR Y = VAR X", ... stand in this order between lines of noise; asked
for are all five names. An example with its answer comes first, always. Prompts follow the official
generator (see `ruler`), with these differences:

- The official example has 5 or more lines of noise and at most 500 tokens, which cannot both hold
  where a token is a byte; the official code then never ends. Here an example that is too long gets
  fewer lines of noise, down to none, and is then used even if it is longer than 500 tokens.
- The prompt itself may also have fewer lines of noise than 5, down to none.
- The names of a prompt, the names of its example and both numbers are all different.
"""

import string
from itertools import pairwise

import numpy as np

from memlm.evaluation.prompts import check_writes, encode, encode_prompt
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, Tools
from memlm.evaluation.tasks.ruler import (
    NOISE,
    TEMPLATES,
    Draft,
    SizedTask,
    around,
    largest_fit,
)

HOPS = 4
_EXAMPLE_TOKENS = 500
_EXAMPLE_LETTERS, _LETTERS = 3, 5
_BEFORE, _AFTER = (
    TEMPLATES["variable_tracking"].template + TEMPLATES["variable_tracking"].answer_prefix
).split("{context}")


def chain_lines(names: list[str], value: str) -> list[str]:
    """The assignments; all but the first end with a space, as in the official prompts."""
    links = [f"VAR {name} = VAR {last} " for last, name in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *links]


def scatter_lines(
    chain: list[str], noise: int, rng: np.random.Generator
) -> tuple[list[str], list[int]]:
    """`noise` lines of noise with the chain's between them, and which those are.

    Each place is before another line of noise where there are enough of them.
    """
    if noise >= len(chain):
        places = np.sort(rng.choice(noise, len(chain), replace=False))
    else:
        places = np.sort(rng.integers(0, noise + 1, len(chain)))
    at = [int(place) + number for number, place in enumerate(places)]
    lines = [NOISE] * noise
    for place, line in zip(at, chain, strict=True):
        lines.insert(place, line)
    return lines, at


def _question(value: str) -> str:
    return _AFTER.format(query=value, num_v=HOPS + 1)


class VariableTracking(SizedTask):
    """vt: one chain of four hops."""

    title = "RULER vt: variable tracking"
    description = (
        "Five variables that hold the same number, assigned one from the other; the score is the "
        "share of their names that the answer contains, in RULER's prompt with one example."
    )
    kind = "shares"
    variants = (CHANGED, ABSENT)
    new_tokens = TEMPLATES["variable_tracking"].tokens_to_generate
    least = 0

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        check_writes(tools.tokenizer, string.ascii_uppercase, name)

        def tokens_of(noise: int) -> int:
            text, _ = self._example(["AAA", "BBB", "CCC", "DDD", "EEE"], "12345", noise)
            return len(encode_prompt(tools.tokenizer, text))

        # Not even the shortest example may fit; there is none without an example.
        self.example_noise = largest_fit(tokens_of, _EXAMPLE_TOKENS, 0) or 0
        self.check_lengths()

    def draft(self, length: int, index: int, variant: str, size: int) -> Draft:
        rng = self.rng(length, index)
        value, example_value = (
            str(number) for number in rng.choice(np.arange(10000, 99999), 2, replace=False)
        )
        names = self._names(rng, _LETTERS, 2 * (HOPS + 1))
        plain, changed = (
            chain_lines(names[: HOPS + 1], value),
            chain_lines(names[HOPS + 1 :], value),
        )
        example, answer = self._example(
            self._names(rng, _EXAMPLE_LETTERS, HOPS + 1), example_value, self.example_noise
        )
        chain = changed if variant == CHANGED else plain
        # The places hang on nothing but the size, so that all variants have the same.
        lines, at = scatter_lines(chain, size, self.rng(length, index, 1))
        if variant == ABSENT:
            lines = [NOISE] * size
        before = f"{example} {answer}\n\n{_BEFORE}"
        context = before + "\n".join(lines)
        start = len(before) + sum(len(line) + 1 for line in lines[: at[0]])
        counts = {
            PLAIN: self._count(plain),
            CHANGED: self._count(changed),
            ABSENT: 0,
        }
        return Draft(
            context,
            _question(value),
            names[HOPS + 1 :] if variant == CHANGED else names[: HOPS + 1],
            {"places": [round(place / (size + len(chain)), 3) for place in at]},
            around(context, start, start + len(chain[0])),
            max(counts.values()) - counts[variant],
        )

    def _example(self, names: list[str], value: str, noise: int) -> tuple[str, str]:
        """The example's prompt and its answer; its lines stand in the same places each time."""
        lines, _ = scatter_lines(chain_lines(names, value), noise, self.rng(0))
        return _BEFORE + "\n".join(lines) + _question(value), " ".join(names)

    def _names(self, rng: np.random.Generator, letters: int, count: int) -> list[str]:
        """Different names of capital letters."""
        found: dict[str, None] = {}
        while len(found) < count:
            name = "".join(rng.choice(list(string.ascii_uppercase), letters))
            if name != "VAR":
                found[name] = None
        return list(found)

    def _count(self, chain: list[str]) -> int:
        return sum(len(encode(self.tools.tokenizer, line + "\n")) for line in chain)
