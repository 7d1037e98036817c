"""What reports read from the points of a suite, and how they write it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from memlm.errors import UserError, nearest
from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.report.numbers import MISSING, bytes_text, value_text
from memlm.evaluation.report.shape import in_order, number_of
from memlm.evaluation.tasks import task_class

Point = dict[str, Any]
Score = dict[str, Any]  # {"mean", "low", "high"}
FAILED, MISSING_POINT = "failed", "missing"


def check_condition(condition: str) -> None:
    """Raise UserError for a condition that no evaluation has."""
    if condition not in ALL_CONDITIONS:
        hint = nearest(condition, ALL_CONDITIONS) or f" (valid: {', '.join(ALL_CONDITIONS)})"
        raise UserError(f"report.condition: unknown condition {condition!r}{hint}")


def check_chance(chance: float | None, loss: bool) -> None:
    """Raise UserError for a level that no score can have."""
    if chance is not None and not 0 <= chance <= (math.inf if loss else 1):
        raise UserError(f"report.chance: must be a score in [0, 1], got {chance:g}")


def check_positive(**options: int | None) -> None:
    """Raise UserError for widths and lengths below one."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"report.{name}: must be at least 1, got {value}")


def names(results: dict[str, Any], key: str) -> list[str]:
    """The memories or tasks ("memory", "task") of all points, in the order of the suite."""
    return list(dict.fromkeys(point[key] for point in results["points"]))


def points_of(results: dict[str, Any], **wanted: Any) -> list[Point]:
    """The points with these values, such as task="parity", by width."""
    found = [
        point
        for point in results["points"]
        if all(point[key] == value for key, value in wanted.items())
    ]
    # A pretrained model has a width of its own: None.
    return sorted(found, key=lambda point: point["width"] or 0)


def chosen(results: dict[str, Any], width: int | None, **wanted: Any) -> Point | None:
    """The point of this width, or of the largest one; None where there is none."""
    found = points_of(results, **wanted)
    if width is not None:
        found = [point for point in found if point["width"] == width]
    return found[-1] if found else None


def chosen_points(results: dict[str, Any], width: int | None) -> list[Point]:
    """`chosen` of every task and memory that has it."""
    found = [
        chosen(results, width, task=task, memory=memory)
        for task in names(results, "task")
        for memory in names(results, "memory")
    ]
    return [point for point in found if point is not None]


def axis_of(evaluation: str | None) -> str:
    """What a setting of an evaluation task is, with its unit."""
    return "setting" if evaluation is None else task_class(evaluation).axis


def metric_of(evaluation: str | None) -> str:
    """What a score of an evaluation task is, with its unit."""
    return "score" if evaluation is None else task_class(evaluation).metric


def evaluation_of(results: dict[str, Any], task: str, wanted: str | None) -> str | None:
    """The evaluation task to report of a task of the suite; None where nothing was evaluated.

    Raises:
        UserError: where `wanted` was not evaluated, or several were and none is wanted.
    """
    found = list(
        dict.fromkeys(name for point in points_of(results, task=task) for name in point["scores"])
    )
    if wanted is None and task in found:
        return task
    if wanted is None and len(found) > 1:
        raise UserError(f"report.task: choose one of {', '.join(found)}")
    if wanted is not None and found and wanted not in found:
        hint = nearest(wanted, found) or f" (valid: {', '.join(found)})"
        raise UserError(f"report.task: {wanted!r} was not evaluated{hint}")
    return wanted or next(iter(found), None)


def settings_of(points: Iterable[Point], evaluation: str | None) -> list[str]:
    """The settings of an evaluation task in any of the points, in order."""
    return in_order(label for point in points for label in point["scores"].get(evaluation, {}))


def check_setting(label: str, settings: Sequence[str]) -> str:
    """The label of a setting: itself, or what "last" stands for.

    Raises:
        UserError: for a setting that was not evaluated.
    """
    if label == "last" and settings:
        return settings[-1]
    if label != "mean" and settings and label not in settings:
        raise UserError(
            f"report.setting: {label!r} was not evaluated (valid: {', '.join(settings)}, last, "
            "mean)"
        )
    return label


def score_at(
    point: Point | None, evaluation: str | None, labels: Sequence[str], condition: str
) -> Score | None:
    """The mean over some settings and the range of the seeds' means.

    None where one of the settings has no score.
    """
    found = [
        (point or {"scores": {}})["scores"].get(evaluation, {}).get(label, {}).get(condition)
        for label in labels
    ]
    if not found or any(score is None or score["mean"] is None for score in found):
        return None
    if len(found) == 1:
        return found[0]
    seeds = zip(*(score["values"] for score in found), strict=True)
    means = [sum(values) / len(values) for values in seeds if None not in values]
    return spread(means)


def spread(values: Sequence[float]) -> Score | None:
    """Mean and range of the seeds' values; None without any."""
    if not values:
        return None
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def cells_of(results: dict[str, Any], point: Point) -> list[dict[str, Any]]:
    """The cells of a point: its model at its learning rate, failed ones too."""
    keys = ("task", "memory", "width", "learning_rate")
    return [cell for cell in results["cells"] if all(cell[key] == point[key] for key in keys)]


def some_failed(results: dict[str, Any], point: Point) -> bool:
    """Whether a point has scores, but not of all its seeds."""
    failed = (cell["error"] is not None for cell in cells_of(results, point))
    return point["error"] is None and any(failed)


def notes(results: dict[str, Any], points: Sequence[Point]) -> list[str]:
    """A line for every model of which seeds failed, with its tasks, and one for missing cells."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in points:
        cells = cells_of(results, point)
        reasons = dict.fromkeys(cell["error"] for cell in cells if cell["error"] is not None)
        if not reasons:
            continue
        failed = sum(cell["error"] is not None for cell in cells)
        sign = "†" if point["error"] is None else FAILED
        said = f"{failed} of {len(cells)} seeds failed ({'; '.join(reasons)})"
        start = f"- {sign}: {point['memory']}, width {point['width']}"
        found.setdefault((start, said), []).append(point["task"])
    # A task is named only where there are several.
    several = len(names(results, "task")) > 1
    lines = [
        f"{', '.join([start, *tasks] if several else [start])}: {said}"
        for (start, said), tasks in found.items()
    ]
    if results.get("missing"):
        lines.append(f"- not finished: {', '.join(results['missing'])}")
    return lines


def score_text(
    results: dict[str, Any], point: Point | None, score: Score | None, loss: bool = False
) -> str:
    """A score with the range of its seeds, as in "97.9 [92.7, 99.4]"; why there is none."""
    if point is None:
        return MISSING
    if point["error"] is not None:
        return FAILED
    if score is None:
        return MISSING
    kind = "losses" if loss else "scores"
    value, low, high = (value_text(score[key], kind) for key in ("mean", "low", "high"))
    text = value if score["low"] == score["high"] else f"{value} [{low}, {high}]"
    return f"{text} †" if some_failed(results, point) else text


def bold_best(
    texts: Sequence[str], scores: Sequence[Score | None], loss: bool = False
) -> list[str]:
    """A column in which the best scores are bold, unless all are alike."""
    shown = [None if score is None else round(score["mean"], 3) for score in scores]
    known = [value for value in shown if value is not None]
    if len(set(known)) < 2:
        return list(texts)
    best = min(known) if loss else max(known)
    return [
        f"**{value}**{space}{rest}" if number == best else text
        for text, number in zip(texts, shown, strict=True)
        for value, space, rest in [text.partition(" ")]
    ]


def count_text(count: int | None) -> str:
    """Parameters or operations; those of a pretrained model that never ran are not known."""
    return MISSING if count is None else f"{count:,}"


def state_text(point: Point) -> str:
    """The bytes of a row's states, smallest to largest over the settings."""
    sizes = [size for size in point["state_bytes"].values() if size is not None]
    if not sizes:
        return MISSING
    first, last = bytes_text(min(sizes)), bytes_text(max(sizes))
    return first if first == last else f"{first} to {last}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in GitHub's Markdown, its first `left` columns aligned to the left."""

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"

    marks = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join([line(header), f"|{'|'.join(marks)}|", *map(line, rows)])


def beyond(labels: Iterable[str], length: int | None) -> list[str]:
    """The settings whose number is larger than `length`; all of them where it is None."""
    return [
        label
        for label in labels
        if length is None or ((number := number_of(label)) is not None and number > length)
    ]
