"""Score against the bytes of the state, a line over the widths of each memory."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.errors import UserError
from memlm.evaluation.report.numbers import bytes_text, unit_of
from memlm.evaluation.suite.reports.drawing import (
    draw_chance,
    draw_legend,
    draw_scores,
    panels,
    score_axis,
)
from memlm.evaluation.suite.reports.reading import (
    FAILED,
    MISSING_POINT,
    Point,
    Score,
    axis_of,
    bold_best,
    check_chance,
    check_condition,
    check_setting,
    count_text,
    evaluation_of,
    markdown,
    metric_of,
    names,
    points_of,
    score_at,
    score_text,
    settings_of,
    state_text,
)

_MOST_SETTINGS = 4
_MOST_TICKS = 5


@strict
@dataclass
class Options:
    """Options of a frontier.

    Attributes:
        task: the evaluation task; by default the only one, or the one with the suite task's name.
        setting: its label, "last" or "mean", or at most four of them, a panel each; by default
            four from the first to the last.
        condition: of the evaluation.
        chance: the score of guesses.
        loss: scores are losses: lower is better.
    """

    task: str | None = None
    setting: str | int | list[str | int] | None = None
    condition: str = "on"
    chance: float | None = None
    loss: bool = False

    def check(self) -> None:
        """Raise UserError for values that are not valid."""
        check_condition(self.condition)
        check_chance(self.chance, self.loss)
        if isinstance(self.setting, list) and not 1 <= len(self.setting) <= _MOST_SETTINGS:
            raise UserError(f"report.setting: give 1 to {_MOST_SETTINGS}, got {len(self.setting)}")


def shown_points(results: dict[str, Any], options: Options) -> list[Point]:
    """All."""
    return results["points"]


def make_table(results: dict[str, Any], options: Options) -> str:
    """A row for every memory and width, a table for every task."""
    tables = []
    for task in names(results, "task"):
        evaluation, chosen, settings = _read(results, task, options)
        points = [
            point
            for memory in names(results, "memory")
            for point in points_of(results, task=task, memory=memory)
        ]
        columns = []
        for setting in chosen:
            scores = [_score(one, evaluation, setting, settings, options) for one in points]
            texts = [
                score_text(results, one, score, options.loss)
                for one, score in zip(points, scores, strict=True)
            ]
            columns.append(bold_best(texts, scores, options.loss))
        rows = [
            [
                point["memory"],
                str(point["width"]),
                state_text(point),
                count_text(point["parameters"]),
                f"{point['learning_rate']:g}",
                *(column[index] for column in columns),
            ]
            for index, point in enumerate(points)
        ]
        unit = "" if options.loss else " (%)"
        header = ["memory", "width", "state of a row", "parameters", "learning rate"]
        header += [f"{evaluation or task}, {setting}{unit}" for setting in chosen]
        title = f"**{task}**\n\n" if len(names(results, "task")) > 1 else ""
        tables.append(title + markdown(header, rows))
    return "\n\n".join(tables)


def draw(results: dict[str, Any], options: Options) -> Any:
    """A panel for every task and setting; the figure."""
    memories, tasks = names(results, "memory"), names(results, "task")
    wanted = [
        (task, evaluation, setting, settings)
        for task in tasks
        for evaluation, chosen, settings in [_read(results, task, options)]
        for setting in chosen
    ]
    figure, axes = panels(len(wanted), len(memories))
    remarks: dict[str, set[str]] = {}
    factor = 1.0 if options.loss else 100.0
    for axis, (task, evaluation, setting, settings) in zip(axes, wanted, strict=True):
        places = []
        for number, memory in enumerate(memories):
            points = []
            for point in points_of(results, task=task, memory=memory):
                size = state_bytes(point, setting)
                score = _score(point, evaluation, setting, settings, options)
                if size is None or score is None:
                    why = MISSING_POINT if point["error"] is None else FAILED
                    remarks.setdefault(memory, set()).add(f"{point['width']} {why}")
                else:
                    points.append((size, score))
            points.sort(key=lambda pair: pair[0])
            if points:
                draw_scores(axis, number, memory, *zip(*points, strict=True), factor)
            places += [size for size, _ in points]
        _byte_axis(axis, places)
        axis.set_xlabel("state of a row")
        score_axis(axis, options.loss)
        shown = f"{setting} {unit_of(axis_of(evaluation))}" if setting.isdigit() else setting
        axis.set_title(shown if len(tasks) == 1 else f"{task}, {shown}")
    axes[0].set_ylabel(metric_of(wanted[0][1]))
    draw_chance(axes, options.chance, factor)
    said = {memory: ", ".join(sorted(texts)) for memory, texts in remarks.items()}
    draw_legend(figure, axes, memories, said)
    return figure


def state_bytes(point: Point, setting: str) -> int | None:
    """Of a row at a setting, the largest of all for their mean; at least one byte.

    None where nothing was measured.
    """
    sizes = point["state_bytes"]
    size = max(sizes.values(), default=None) if setting == "mean" else sizes.get(setting)
    return None if size is None else max(1, size)


def _read(
    results: dict[str, Any], task: str, options: Options
) -> tuple[str | None, list[str], list[str]]:
    """The evaluation task, the settings to show and all settings."""
    evaluation = evaluation_of(results, task, options.task)
    settings = settings_of(points_of(results, task=task), evaluation)
    if options.setting is None:
        return evaluation, _even(settings) or ["last"], settings
    given = options.setting if isinstance(options.setting, list) else [options.setting]
    chosen = dict.fromkeys(check_setting(str(label), settings) for label in given)
    return evaluation, list(chosen), settings


def _even(labels: list[str]) -> list[str]:
    """At most four of the labels in even steps, the first and the last among them."""
    if len(labels) <= _MOST_SETTINGS:
        return labels
    step = (len(labels) - 1) / (_MOST_SETTINGS - 1)
    return [labels[round(place * step)] for place in range(_MOST_SETTINGS)]


def _score(
    point: Point, evaluation: str | None, setting: str, settings: list[str], options: Options
) -> Score | None:
    labels = settings if setting == "mean" else [setting]
    return score_at(point, evaluation, labels, options.condition)


def _byte_axis(axis: Any, values: list[int]) -> None:
    """A logarithmic axis of bytes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = values or [1024]
    first, last = min(values) / 1.5, max(values) * 1.5
    powers = [power for power in range(60) if first <= 2**power <= last]
    step = max(1, -(-len(powers) // _MOST_TICKS))
    axis.set_xscale("log", base=2)
    axis.set_xlim(first, last)
    axis.xaxis.set_major_locator(FixedLocator([2**power for power in powers[::step]]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: bytes_text(int(value)).replace(".0 ", " "))
    )
    axis.tick_params(axis="x", rotation=30)
