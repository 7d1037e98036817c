"""Scores as colours: depth by length, task by length."""

import math
from typing import Any

from memlm.evaluation.plots.style import GREY, new_figure, png, shorten, tick_text
from memlm.evaluation.report.shape import (
    Runs,
    conditions_of,
    in_order,
    name_of,
    score_of,
    settings_of,
    task_of,
)

_MOST_NUMBERS = 20  # rows with a number in every cell


def draw_depths(run: dict[str, Any], task: str) -> bytes | None:
    """One panel per condition; None where a task has no depths."""
    found = run["tasks"].get(task, {"depths": {}})
    depths, axis = found["depths"], found.get("axis", "")
    if not depths:
        return None
    settings = in_order(depths)
    rows = sorted({depth for cells in depths.values() for depth in cells}, key=float)
    conditions = [
        condition
        for condition in conditions_of([run], task)
        # Where nothing is hidden there is no depth.
        if any(condition in cell for cells in depths.values() for cell in cells.values())
    ]
    panels = {
        condition if condition in ("changed", "absent") else f"memory {condition}": [
            [_value(depths[setting].get(depth, {}).get(condition)) for setting in settings]
            for depth in rows
        ]
        for condition in conditions
    }
    return _draw(
        panels,
        [f"{100 * float(depth):.0f}" for depth in rows],
        [tick_text(setting, axis) for setting in settings],
        f"{found['title']}: {shorten(name_of(run))}",
        axis,
        "depth (%)",
        columns=4,
    )


def draw_group_depths(run: dict[str, Any], tasks: list[str]) -> bytes | None:
    """One panel per task that has depths, memory on; None where none has."""
    mine = [task for task in tasks if run["tasks"].get(task, {"depths": {}})["depths"]]
    if not mine:
        return None
    depths = {task: run["tasks"][task]["depths"] for task in mine}
    settings = in_order(setting for task in mine for setting in depths[task])
    rows = sorted(
        {depth for task in mine for cells in depths[task].values() for depth in cells}, key=float
    )
    panels = {
        task: [
            [_value(depths[task].get(setting, {}).get(depth, {}).get("on")) for setting in settings]
            for depth in rows
        ]
        for task in mine
    }
    axis = run["tasks"][mine[0]]["axis"]
    return _draw(
        panels,
        [f"{100 * float(depth):.0f}" for depth in rows],
        [tick_text(setting, axis) for setting in settings],
        f"By depth, memory on: {shorten(name_of(run))}",
        axis,
        "depth (%)",
        columns=4,
        numbered=False,
    )


def draw_tasks(runs: Runs, tasks: list[str]) -> bytes:
    """One panel per model, with the memory on and off where it was taken away."""
    settings = settings_of(runs, *tasks)
    axis = task_of(runs, tasks[0])["axis"]
    panels = {}
    for run in runs:
        conditions = conditions_of([run], *tasks)
        for condition in ("on", "off"):
            if condition in conditions:
                title = shorten(name_of(run), 20) if len(runs) > 1 else "memory"
                if "off" in conditions or len(runs) == 1:
                    title = f"{title} {condition}"
                panels[title] = [
                    [_value(score_of(run, task, setting, condition)) for setting in settings]
                    for task in tasks
                ]
    return _draw(
        panels, tasks, [tick_text(setting, axis) for setting in settings], "", axis, "", columns=3
    )


def _value(estimate: dict[str, Any] | None) -> float:
    return math.nan if estimate is None else 100 * estimate["value"]


def _draw(
    panels: dict[str, list[list[float]]],
    row_names: list[str],
    column_names: list[str],
    title: str,
    xlabel: str,
    ylabel: str,
    columns: int,
    numbered: bool = True,
) -> bytes:
    """The panels with one scale of colours; with more rows than are read singly, no numbers."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    numbered = numbered and len(row_names) <= _MOST_NUMBERS
    height = 0.36 * len(row_names) if numbered else min(0.16 * len(row_names), 4.0)
    names = 0.09 * max(map(len, row_names))
    wide = max(1.5, 0.46 * len(column_names))
    # A letter of the title is a tenth of an inch wide.
    width = max(1.6 + names + columns * wide, 0.5 + 0.1 * len(title))
    figure, axes = new_figure(width, 1.5 + rows * (max(height, 1.0) + 0.55), rows, columns)
    image = None
    for index, (axis, (name, grid)) in enumerate(zip(axes, panels.items(), strict=False)):
        axis.set_facecolor(GREY)
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid if numbered else []):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    ink = "black" if value > 55 else "white"
                    text = f"{value:.0f}"
                    axis.text(column, row, text, ha="center", va="center", color=ink, size=9)
        axis.set_title(name, size=10)
        axis.set_xticks([place + 0.5 for place in range(len(column_names) - 1)], minor=True)
        axis.set_yticks([place + 0.5 for place in range(len(row_names) - 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=1 if numbered else 0.4)
        axis.tick_params(which="minor", length=0)
        narrow = max(map(len, column_names)) > 4
        axis.set_xticks(
            range(len(column_names)), column_names, rotation=60 if narrow else 0, size=9
        )
        step = 1 if numbered else -(-len(row_names) // 8)
        first = index % columns == 0
        axis.set_yticks(range(0, len(row_names), step), row_names[::step] if first else [], size=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel(xlabel, size=11)
    if ylabel:
        figure.supylabel(ylabel, size=11)
    figure.colorbar(image, ax=axes, label="score (%)", pad=0.02, shrink=min(1.0, 1.0 / rows + 0.3))
    if title:
        figure.suptitle(title, size=12)
    return png(figure)
