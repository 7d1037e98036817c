"""A pass key hidden in real text, asked for from further away than attention reaches.

Every prompt is real text with one line `# The pass key is 12345.` in it and ends with the same
line cut before the digits. What follows is generated greedily; the number that it starts with has
to be the key, no digit more or less.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from memlm.data.passkey import passkey_tokens
from memlm.errors import UserError
from memlm.evaluation.prompts import Context, Question, Trial, encode_prompt
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, PromptTask, Record, Tools

_LOOK = 1 << 12  # tokens read at a time where a line border is looked for
_EXCERPT = 120  # tokens shown on each side of a needle


class NeedleTask(PromptTask):
    """Pass keys at depths from the start of the text to the last place out of reach."""

    title = "Needle in real text"
    description = (
        "A line with a pass key stands in real text; the prompt ends with the same line cut before "
        "the digits, and only the exact key counts. Depth 100 % is the last place that is "
        "far enough from the question."
    )
    variants = (CHANGED, ABSENT)

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        options = tools.config.needle
        self.pieces = passkey_tokens(tools.tokenizer)
        self.start = encode_prompt(tools.tokenizer, "")  # a bos, where there is one
        self.depths, self.digits = options.depths, options.digits
        self.distance = tools.distance if options.distance is None else options.distance
        line = self.pieces.overhead + self.digits
        self.least = len(self.start) + self.distance + 2 * line + 1
        for length in tools.config.all_lengths:
            if length < self.least:
                raise UserError(
                    f"needle: lengths: {length} tokens are too short for a needle {self.distance} "
                    "tokens before the question (attention's reach); use at least "
                    f"{self.least}, or a smaller needle.distance"
                )

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        # Seeded without the task's name, so that earlier results can be repeated.
        rng = np.random.default_rng((self.tools.config.seed, length, index))
        key = rng.integers(0, 10, size=self.digits)
        line = self.pieces.line(key)
        question = np.concatenate([self.pieces.newline, self.pieces.prefix])
        around = len(self.start) + len(line) + len(question) + self.digits + len(self.pieces.stop)
        room = length - around
        haystack = self.tools.haystack
        # A text that has to be repeated anyway may start anywhere.
        starts = len(haystack) - room + 1 if room <= len(haystack) else len(haystack)
        offset = int(rng.integers(0, starts))
        depth = index % self.depths / (self.depths - 1) if self.depths > 1 else 0.5
        latest = room - self.distance
        position = self._line_border(offset, depth * latest, latest)
        if variant == CHANGED:
            # Every digit becomes another one: no part of the old key is right.
            key = (key + rng.integers(1, 10, size=self.digits)) % 10
            line = self.pieces.line(key)
        elif variant == ABSENT:
            line = haystack.read(offset + room, offset + room + len(line))
        answer = "".join(map(str, key))
        before, after = haystack.piece(offset, position), room - position
        return Trial(
            Context([self.start, before, line, haystack.piece(offset + position, after)]),
            (Question(question, (answer,), self.digits),),
            {"depth": depth, "position": position, "distance": after},
            self._excerpt(offset, position, room, line),
        )

    def score(self, question: Question, prediction: str) -> float:
        # Tokens of several digits leave room for more text behind the key.
        found = re.match(r"\s*(\d+)", prediction)
        return float(found is not None and found[1] == question.references[0])

    def _line_border(self, offset: int, wanted: float, latest: int) -> int:
        """The start of a line of the text at `offset` that is nearest to `wanted`, not later than
        `latest`."""
        before = self._border_before(offset, int(min(wanted, latest)))
        after = self._border_after(offset, int(np.ceil(wanted)), latest)
        if after is None or wanted - before <= after - wanted:
            return before
        return after

    def _border_before(self, offset: int, place: int) -> int:
        """The last line start at or before `place`; the text starts with one."""
        stop = place
        while stop > 0:
            start = max(0, stop - _LOOK)
            found = np.flatnonzero(
                self.pieces.ends_line[self.tools.haystack.read(offset + start, offset + stop)]
            )
            if len(found):
                return start + int(found[-1]) + 1
            stop = start
        return 0

    def _border_after(self, offset: int, place: int, latest: int) -> int | None:
        """The first line start from `place` to `latest`; None where there is none."""
        start = max(place - 1, 0)
        if place == 0:
            return 0
        while start < latest:
            stop = min(start + _LOOK, latest)
            found = np.flatnonzero(
                self.pieces.ends_line[self.tools.haystack.read(offset + start, offset + stop)]
            )
            if len(found):
                return start + int(found[0]) + 1
            start = stop
        return None

    def _excerpt(self, offset: int, position: int, room: int, line: np.ndarray) -> str:
        """The hidden line and the text around it in the prompt."""
        read = self.tools.haystack.read
        before = read(offset + max(0, position - _EXCERPT), offset + position)
        after = read(offset + position, offset + min(room, position + _EXCERPT))
        return self.tools.tokenizer.decode(np.concatenate([before, line, after]).tolist())

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        return {
            "least_distance_tokens": self.distance,
            "chance": 10.0**-self.digits,
            "haystack_tokens": len(self.tools.haystack),
        }
