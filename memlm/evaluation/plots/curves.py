"""Scores over lengths (or pairs, or positions), with their intervals."""

from collections.abc import Callable
from typing import Any

from memlm.evaluation.plots.style import (
    COLOURS,
    MARKERS,
    Places,
    error_bars,
    legend,
    line,
    new_figure,
    png,
    shorten,
)
from memlm.evaluation.report.numbers import metric_name
from memlm.evaluation.report.shape import (
    Runs,
    conditions_of,
    name_of,
    score_of,
    settings_of,
    task_of,
)

_COLUMNS = 3
_WIDEST_SHIFT = 0.24  # octaves over which the conditions of one length are spread


def draw_recall(runs: Runs, task: str, confidence: float) -> bytes:
    """One panel per model, one colour per condition."""
    runs = [run for run in runs if task in run["tasks"]]
    found = task_of(runs, task)
    places = Places(settings_of(runs, task))
    columns = min(_COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    width = 7.0 if columns == 1 else 4.0 * columns
    figure, axes = new_figure(width, 3.4 * rows + 0.7, rows, columns, sharey=True)
    for axis, run in zip(axes, runs, strict=False):
        _draw_conditions(
            axis,
            places,
            conditions_of([run], task),
            lambda setting, condition, run=run: score_of(run, task, setting, condition),
            100.0,
        )
        _mark_shares(axis)
        places.mark(axis, found["axis"])
        if len(runs) > 1:
            axis.set_title(shorten(name_of(run)), size=11)
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel(f"{found['metric']}, {100 * confidence:.0f} % interval")
    figure.suptitle(f"{found['title']}: {metric_name(found['metric'])} by condition", size=12)
    legend(figure, axes[: len(runs)])
    return png(figure)


def draw_group(runs: Runs, tasks: list[str], confidence: float) -> bytes:
    """One small panel per task: memory on and off by colour, models by line style."""
    found, places = task_of(runs, tasks[0]), Places(settings_of(runs, *tasks))
    conditions = [name for name in ("on", "off") if name in conditions_of(runs, *tasks)]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = new_figure(2.9 * columns + 0.6, 2.3 * rows + 0.9, rows, columns, sharey=True)
    for axis, task in zip(axes, tasks, strict=False):
        for number, run in enumerate(runs):
            if task in run["tasks"]:
                _draw_conditions(
                    axis,
                    places,
                    conditions,
                    lambda setting, condition, run=run, task=task: score_of(
                        run, task, setting, condition
                    ),
                    100.0,
                    style=line(number),
                    named=f"{shorten(name_of(run), 24)}, " if len(runs) > 1 else "",
                )
        _mark_shares(axis)
        places.mark(axis, found["axis"])
        if axes.index(axis) + columns < len(tasks):
            axis.set_xlabel("")
        axis.tick_params(labelsize=9)
        axis.set_title(task, size=10)
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    figure.supylabel(f"score (%), {100 * confidence:.0f} % interval", size=11)
    legend(figure, axes)
    return png(figure)


def draw_losses(runs: Runs, task: str, confidence: float) -> bytes:
    """Per model: the loss by position, and what it rises by without the memory."""
    runs = [run for run in runs if task in run["tasks"]]
    found = task_of(runs, task)
    spans = [label for label in settings_of(runs, task) if label != "all"]
    places = Places(spans)
    ablated = [name for name in conditions_of(runs, task) if name != "on"]
    columns = 2 if ablated else 1
    figure, axes = new_figure(5.25 * columns, 3.7 * len(runs) + 0.6, len(runs), columns)
    interval = f"{100 * confidence:.0f} % interval"
    for number, run in enumerate(runs):
        left, *right = axes[columns * number : columns * (number + 1)]
        start = f"{shorten(name_of(run))}: " if len(runs) > 1 else ""
        _draw_conditions(
            left,
            places,
            conditions_of([run], task),
            lambda setting, condition, run=run: score_of(run, task, setting, condition),
        )
        left.set_title(f"{start}loss", size=11)
        left.set_ylabel(f"{found['metric']}, {interval}")
        if ablated and conditions_of([run], task) == ["on"]:
            right.pop().set_axis_off()
        for axis in right:
            gains = run["tasks"][task]["memory_gain"]
            _draw_conditions(
                axis,
                places,
                ablated,
                lambda setting, condition, gains=gains: gains.get(setting, {}).get(condition),
            )
            axis.axhline(0, color=COLOURS["on"], linewidth=1)
            axis.set_title("extra loss over memory on, same documents", size=11)
            axis.set_ylabel(f"{found['metric']}, {interval}")
        for axis in (left, *right):
            places.mark(axis, found["axis"])
            axis.grid(axis="y", alpha=0.4)
    legend(figure, axes)
    return png(figure)


def _draw_conditions(
    axis: Any,
    places: Places,
    conditions: list[str],
    estimate: Callable[[str, str], dict[str, Any] | None],
    factor: float = 1.0,
    style: Any = "-",
    named: str = "",
) -> None:
    """Lines with error bars; conditions stand a little beside each other."""
    step = _WIDEST_SHIFT / max(len(conditions) - 1, 1)
    for number, condition in enumerate(conditions):
        points = [(setting, estimate(setting, condition)) for setting in places.values]
        # A loss that is no number is unknown.
        points = [
            (setting, point)
            for setting, point in points
            if point is not None and point["value"] is not None
        ]
        if not points:
            continue
        shift = (number - (len(conditions) - 1) / 2) * step
        text = condition if condition in ("changed", "absent") else f"memory {condition}"
        axis.errorbar(
            [places.at(setting, shift) for setting, _ in points],
            [factor * point["value"] for _, point in points],
            yerr=error_bars([point for _, point in points], factor),
            color=COLOURS[condition],
            marker=MARKERS[condition],
            markersize=4.5,
            linewidth=1.3,
            elinewidth=0.9,
            capsize=2,
            linestyle=style,
            label=named + text,
        )


def _mark_shares(axis: Any) -> None:
    axis.set_ylim(-4, 104)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(axis="y", alpha=0.4)
