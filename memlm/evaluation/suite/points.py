"""From cells to the points of a report: the best learning rate of each model, over its seeds."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


def make_points(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point for every task, memory and width, in the order in which they come.

    The learning rate is the one at which the fewest seeds failed, then the one with the lowest mean
    loss on held-out rows over the seeds (of the answers, where there are any), then the largest.

    Args:
        cells: of `run_cell`.

    Returns:
        {"task", "memory", "width", "learning_rate", "seeds" and "steps" and "seconds" (mean and
        sum over them), "parameters", "flops_per_token", "state_bytes", "memory_state_bytes",
        "scores": {evaluation task: {setting: {condition: {"mean", "low", "high": the lowest and
        highest seed, "values": per seed}}}}, "measures": means over the seeds, "error": None, or
        why no seed has scores}. Seeds are those that did not fail, if there is one.
    """
    models: dict[tuple, dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        rates = models.setdefault((cell["task"], cell["memory"], cell["width"]), {})
        rates.setdefault(cell["learning_rate"], []).append(cell)
    most = max((len(own) for rates in models.values() for own in rates.values()), default=0)
    return [
        _point(min(rates.values(), key=lambda own: _rank(own, most))) for rates in models.values()
    ]


def held_out_loss(cell: dict[str, Any]) -> float:
    """What learning rates are chosen by, in bits; infinity where it is not finite or unknown."""
    losses = cell["held_out"]
    loss = losses.get("answer_bits", losses.get("bits"))
    return math.inf if loss is None or cell["error"] is not None else loss


def _rank(cells: Sequence[dict[str, Any]], most: int) -> tuple[int, float, float]:
    losses = [loss for cell in cells if math.isfinite(loss := held_out_loss(cell))]
    mean = sum(losses) / len(losses) if losses else math.inf
    return most - len(losses), mean, -cells[0]["learning_rate"]


def _point(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = [cell for cell in cells if cell["error"] is None]
    kept = whole or cells
    first = kept[0]
    same = ("task", "memory", "width", "learning_rate", "parameters", "flops_per_token")
    return {key: first[key] for key in same} | {
        "seeds": [cell["seed"] for cell in kept],
        "state_bytes": first["state_bytes"],
        "memory_state_bytes": first["memory_state_bytes"],
        "scores": _over_seeds([cell["scores"] for cell in kept], _spread),
        "measures": _over_seeds([cell["measures"] for cell in kept], _mean),
        "steps": _mean([cell["steps"] for cell in kept]),
        "seconds": round(sum(cell["seconds"] for cell in kept), 2),
        "error": None if whole else first["error"],
    }


def _over_seeds(trees: Sequence[Any], combine) -> Any:
    """Nested mappings of the same shape, with the numbers at each place combined."""
    if isinstance(trees[0], dict):
        return {key: _over_seeds([tree[key] for tree in trees], combine) for key in trees[0]}
    return combine(trees)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (None, None)
    return {"mean": _mean(values), "low": low, "high": high, "values": list(values)}
