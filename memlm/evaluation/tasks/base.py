"""What a task returns, and how it reports progress and cost."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from memlm.evaluation.statistics import Estimate, bootstrap_mean, paired_proportions


class ProgressBar(Protocol):
    """The part of tqdm that is used."""

    def update(self, tokens: int) -> Any:
        """Advance by a number of tokens."""


@dataclass
class Meter:
    """Tokens and seconds of reading and of generating, and the bar that shows them."""

    bar: ProgressBar | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def advance(self, tokens: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(tokens)

    @contextmanager
    def measure(self, kind: str, tokens: int) -> Iterator[None]:
        """Count `tokens` and the time spent inside as `kind`."""
        start = time.perf_counter()
        yield
        self.tokens[kind] = self.tokens.get(kind, 0) + tokens
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start

    def rates(self) -> dict[str, float]:
        """Tokens per second of every kind."""
        return {
            f"{kind}_tokens_per_second": round(self.tokens[kind] / max(self.seconds[kind], 1e-9), 1)
            for kind in self.tokens
        }


@dataclass
class TaskResult:
    """Numbers of one task.

    Attributes:
        metric: what a score is, with its unit.
        axis: what a setting is, with its unit.
        scores: setting -> condition -> estimate.
        memory_gain: setting -> condition -> estimate of how much better `on` is than the
            condition on the same prompts; positive = the memory helps.
        cost: tokens per second and bytes of state.
        details: further numbers of this task alone.
    """

    metric: str
    axis: str
    scores: dict[str, dict[str, Estimate]]
    memory_gain: dict[str, dict[str, Estimate]]
    cost: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def gains(
    values: dict[str, Sequence[float]], higher_is_better: bool, binary: bool = False
) -> dict[str, Estimate]:
    """How much better `on` is than every other condition, paired unit by unit.

    Args:
        values: condition -> one value per independent unit (prompt, row or document).
        higher_is_better: False for losses.
        binary: values are hits and misses.
    """
    found = {}
    for condition, other in values.items():
        if condition == "on":
            continue
        if binary:
            found[condition] = paired_proportions(values["on"], other)
            continue
        sign = 1.0 if higher_is_better else -1.0
        found[condition] = bootstrap_mean(
            [sign * (a - b) for a, b in zip(values["on"], other, strict=True)]
        )
    return found
