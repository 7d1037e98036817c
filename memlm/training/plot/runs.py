"""Run folders as curves by metric."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from memlm.errors import UserError
from memlm.training.logs import METRICS_FILE, read_metrics

LONG = 200  # points of a curve; one with more is smoothed


@dataclass(frozen=True)
class Curve:
    """A metric over steps; only numbers that are finite.

    Attributes:
        steps: where it was measured, ascending.
        values: one per step.
    """

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass
class Run:
    """What a run folder says of its training so far.

    Attributes:
        name: tells it from the other runs.
        folder: the run folder.
        training: curves of the training steps by metric.
        evaluations: curves of the evaluations by metric.
        stages: (first step, tokens per row) of the stages of its curriculum.
    """

    name: str
    folder: Path
    training: dict[str, Curve]
    evaluations: dict[str, Curve]
    stages: list[tuple[float, Any]]

    @property
    def last_step(self) -> float | None:
        """The last step of which anything is known."""
        steps = [c.steps[-1] for part in (self.training, self.evaluations) for c in part.values()]
        return max(steps, default=None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of some folders, finished or in progress.

    Raises:
        UserError: for a folder without metrics, one that is given twice, a line that is no record,
            or when no run has come so far as to have a record.
    """
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{folders[number]}: the run is given twice")
    runs = [
        _read_run(folder, name) for folder, name in zip(folders, run_names(places), strict=True)
    ]
    if all(run.last_step is None for run in runs):
        raise UserError(
            f"{folders[0] / METRICS_FILE}: no step is recorded yet; try again when there is one"
        )
    return runs


def run_names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and of those that would be the same as many as tell them apart.

    Args:
        places: absolute paths, all different.
    """
    lengths = [1] * len(places)
    while True:
        names = [
            str(Path(*place.parts[-length:])) for place, length in zip(places, lengths, strict=True)
        ]
        same = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not same:
            return names
        for number in same:
            lengths[number] += 1


def _read_run(folder: Path, name: str) -> Run:
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    if not path.is_file():
        raise UserError(f"{folder}: it is no run folder, it has no {METRICS_FILE}")
    records = read_metrics(path)
    training = [record for record in records if not record.get("evaluation")]
    evaluations = [record for record in records if record.get("evaluation")]
    return Run(name, folder, _curves(training), _curves(evaluations), _stages(training))


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and _is_number(value):
                curve = found.setdefault(key, Curve([], []))
                curve.steps.append(record["step"])
                curve.values.append(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stages(records: Sequence[dict[str, Any]]) -> list[tuple[float, Any]]:
    stages, current = [], None
    for record in records:
        stage = record.get("stage")
        if stage is not None and stage != current:
            stages.append((record["step"], record.get("length")))
            current = stage
    return stages


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves at every step at which any of them was measured."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    return Curve(steps, [sum(values[step]) / len(values[step]) for step in steps])


def smoothed(curve: Curve, logarithms: bool = False) -> Curve | None:
    """The curve without its noise: a running mean, twice; None for one that is not long.

    The window is a fiftieth of the curve. It is less at its ends, where the first values, often
    steep, keep it centred, and the last ones, often level, do not.

    Args:
        curve: of numbers above 0, if `logarithms`.
        logarithms: take means of logarithms, which a spike does not lift for long.
    """
    if len(curve.steps) <= LONG:
        return None
    values = [math.log(value) for value in curve.values] if logarithms else curve.values
    half = len(values) // 100
    values = _running_mean(_running_mean(values, half), half)
    return Curve(curve.steps, [math.exp(value) for value in values] if logarithms else values)


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    count = len(values)
    sums = [0.0, *accumulate(values)]
    means = []
    for place in range(count):
        low = place - min(half, place)
        high = min(place + min(half, place), count - 1) + 1
        means.append((sums[high] - sums[low]) / (high - low))
    return means
