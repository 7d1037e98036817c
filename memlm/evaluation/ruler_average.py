"""RULER's averages over its tasks and lengths (Hsieh et al., 2024)."""

from typing import Any

from memlm.evaluation.tasks import RULER

THRESHOLD = 0.856  # Llama-2-7B at 4K, what the paper calls satisfactory


def ruler_averages(tasks: dict[str, Any]) -> dict[str, Any] | None:
    """The official averages of one model; None unless all 13 tasks are there.

    A mean over the tasks counts every task the same. The weighted means over the lengths weight
    them by 1, 2, 3 ... from the shortest (`increasing`) or from the longest (`decreasing`).

    Args:
        tasks: by name, each with "scores" {length: {condition: {"value"}}}; shares in [0, 1].

    Returns:
        By condition that all tasks were measured in: {"means": {length: mean over tasks},
        "average", "increasing", "decreasing": means over the lengths, "effective_length": the
        longest length in tokens whose mean exceeds 85.6 %, or None}.
    """
    if any(name not in tasks for name in RULER):
        return None
    scores = [tasks[name]["scores"] for name in RULER]
    lengths = sorted(set.intersection(*(set(score) for score in scores)), key=int)
    if not lengths:
        return None
    cells = [score[length] for score in scores for length in lengths]
    conditions = [name for name in cells[0] if all(name in cell for cell in cells)]
    return {name: _averages(scores, lengths, name) for name in conditions}


def _averages(scores: list[dict[str, Any]], lengths: list[str], condition: str) -> dict[str, Any]:
    means = {
        length: sum(score[length][condition]["value"] for score in scores) / len(scores)
        for length in lengths
    }
    values, count = list(means.values()), len(means)
    total = count * (count + 1) / 2
    good = [int(length) for length, mean in means.items() if mean > THRESHOLD]
    return {
        "means": means,
        "average": sum(values) / count,
        "increasing": sum(place * mean for place, mean in enumerate(values, 1)) / total,
        "decreasing": sum(place * mean for place, mean in enumerate(values[::-1], 1)) / total,
        "effective_length": max(good, default=None),
    }
