"""Two models on the same trials: which one is better, and by how much."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from memlm.evaluation.statistics import estimate, independent_difference, paired_difference
from memlm.evaluation.tasks.base import Record

_Trials = dict[str, dict[str, dict[int, Record]]]  # task -> setting -> trial


def compare_runs(
    runs: Sequence[dict[str, Any]], records: Sequence[Mapping[str, Sequence[Record]]]
) -> list[dict[str, Any]]:
    """The difference of every two models in every task and setting, with the memory on.

    Two trials belong together when task, setting, number and references are the same. Where all
    their prompts are the same too, the difference is paired: a bootstrap over trials (where all
    differ by the same, an interval from the shares of both, which keeps a width). Models with
    different tokenizers read different prompts; their difference is one of independent trials.

    Args:
        runs: as in the results: {"model": {"name"}, "tasks": {task: {"kind", "scores"}}}.
        records: of each run, by task.

    Returns:
        [{"task", "setting", "first", "second": names, "difference": first - second as {"value",
        "low", "high", "count"}, "paired", "first_only", "second_only": trials in which only (for
        partial scores and losses: more) the first or the second was right}].
    """
    trials = [_by_trial(tasks) for tasks in records]
    found = []
    for (one, first), (two, second) in combinations(zip(runs, trials, strict=True), 2):
        for task, details in one["tasks"].items():
            for setting in details["scores"]:
                pairs = list(
                    _pairs(
                        first.get(task, {}).get(setting, {}), second.get(task, {}).get(setting, {})
                    )
                )
                if pairs:
                    found.append(
                        {
                            "task": task,
                            "setting": setting,
                            "first": one["model"]["name"],
                            "second": two["model"]["name"],
                            **_compare(pairs, details["kind"]),
                        }
                    )
    return found


def _by_trial(tasks: Mapping[str, Sequence[Record]]) -> _Trials:
    found: _Trials = {}
    for task, records in tasks.items():
        for record in records:
            if record.condition == "on":
                settings = found.setdefault(task, {})
                settings.setdefault(record.setting, {})[record.trial] = record
    return found


def _pairs(first: dict[int, Record], second: dict[int, Record]) -> Iterator[tuple[Record, Record]]:
    for trial in sorted(first.keys() & second.keys()):
        a, b = first[trial], second[trial]
        if _references(a) == _references(b):
            yield a, b


def _references(record: Record) -> list[list[str]]:
    return [list(answer["references"]) for answer in record.answers]


def _compare(pairs: Sequence[tuple[Record, Record]], kind: str) -> dict[str, Any]:
    first, second = [a.score for a, _ in pairs], [b.score for _, b in pairs]
    paired = all(a.prompt and a.prompt == b.prompt for a, b in pairs)
    if paired:
        difference = paired_difference(first, second, kind)
    else:
        difference = independent_difference(estimate(first, kind), estimate(second, kind))
    sign = -1 if kind == "losses" else 1
    return {
        "difference": {
            "value": difference.value,
            "low": difference.low if math.isfinite(difference.low) else None,
            "high": difference.high if math.isfinite(difference.high) else None,
            "count": difference.count,
        },
        "paired": paired,
        "first_only": sum(sign * a > sign * b for a, b in zip(first, second, strict=True)),
        "second_only": sum(sign * a < sign * b for a, b in zip(first, second, strict=True)),
    }
