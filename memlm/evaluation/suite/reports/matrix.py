"""Memories by tasks: which memory solves what."""

import math
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.errors import UserError
from memlm.evaluation.plots.style import new_figure, shorten
from memlm.evaluation.suite.reports.drawing import DOUBLE, SINGLE
from memlm.evaluation.suite.reports.reading import (
    FAILED,
    Point,
    Score,
    beyond,
    check_condition,
    check_positive,
    chosen,
    chosen_points,
    evaluation_of,
    markdown,
    names,
    points_of,
    score_at,
    score_text,
    settings_of,
)

_CELL = 0.24  # inches, the height of a row


@strict
@dataclass
class Options:
    """Options of a matrix.

    Attributes:
        task: the evaluation task; by default the only one, or the one with the suite task's name.
        groups: tasks of the suite by the names of their groups, in this order; the others follow.
        beyond: only settings larger than this, the longest trained one, count; by default all.
        solved: a task with at least this score is solved.
        condition: of the evaluation.
        width: of the models; by default the largest of each memory.
    """

    task: str | None = None
    groups: dict | None = None
    beyond: int | None = None
    solved: float = 0.9
    condition: str = "on"
    width: int | None = None

    def check(self) -> None:
        """Raise UserError for groups that are no lists of tasks, or share some."""
        check_condition(self.condition)
        check_positive(width=self.width, beyond=self.beyond)
        tasks: list[str] = []
        for name, members in (self.groups or {}).items():
            if not isinstance(members, list) or not all(isinstance(one, str) for one in members):
                raise UserError(f"report.groups.{name}: expected a list of tasks, got {members!r}")
            tasks += members
        if len(set(tasks)) != len(tasks):
            raise UserError("report.groups: a task is in two groups; each belongs in one")
        if not 0 < self.solved <= 1:
            raise UserError(f"report.solved: must be in (0, 1], got {self.solved}")


def shown_points(results: dict[str, Any], options: Options) -> list[Point]:
    """Those of the width, of every task and memory."""
    return chosen_points(results, options.width)


def make_table(results: dict[str, Any], options: Options) -> str:
    """Tasks in rows, by group; memories in columns; solved ones are bold."""
    memories, grid = names(results, "memory"), _grid(results, options)
    rows, solved = [], [0] * len(memories)
    for group, task in _ordered(results, options):
        texts = []
        for index, (point, score) in enumerate(grid[task]):
            text = score_text(results, point, score)
            if score is not None and score["mean"] >= options.solved:
                solved[index] += 1
                value, space, rest = text.partition(" ")
                text = f"**{value}**{space}{rest}"
            texts.append(text)
        rows.append([group, task, *texts])
    rows.append(["", f"solved (at least {100 * options.solved:g} %)", *map(str, solved)])
    if not options.groups:
        rows = [row[1:] for row in rows]
        return markdown(["task", *memories], rows)
    return markdown(["group", "task", *memories], rows, left=2)


def draw(results: dict[str, Any], options: Options) -> Any:
    """Memories in rows, tasks in columns; the figure."""
    from matplotlib.patches import Rectangle

    memories, columns = names(results, "memory"), _ordered(results, options)
    grid = _grid(results, options)
    values = [[_value(grid[task][row][1]) for _, task in columns] for row in range(len(memories))]
    width = SINGLE if len(columns) <= 4 else DOUBLE
    longest = max(len(task) for _, task in columns)
    height = 0.75 + _CELL * len(memories) + 0.055 * min(longest, 28)
    figure, (axis,) = new_figure(width, height)
    axis.set_facecolor("#e4e4e4")
    image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for row, numbers in enumerate(values):
        for column, number in enumerate(numbers):
            point, score = grid[columns[column][1]][row]
            solved = score is not None and score["mean"] >= options.solved
            ink = "black" if math.isnan(number) or number > 55 else "white"
            text = f"{number:.0f}"
            if math.isnan(number):
                text = FAILED if point is not None and point["error"] else "–"
            axis.text(
                column, row, text, ha="center", va="center", color=ink,
                size=5.5 if text == FAILED else 7, weight="bold" if solved else "normal",
            )  # fmt: skip
            if solved:
                axis.add_patch(
                    Rectangle((column - 0.38, row - 0.38), 0.76, 0.76, fill=False,
                              edgecolor="black", linewidth=0.9)
                )  # fmt: skip
    axis.set_xticks(
        range(len(columns)), [shorten(task, 28) for _, task in columns], rotation=45, ha="right",
        rotation_mode="anchor",
    )  # fmt: skip
    axis.set_yticks(range(len(memories)), map(shorten, memories))
    axis.tick_params(length=0)
    axis.set_xlabel(f"framed: solved, at least {100 * options.solved:g} %", size=7)
    for edge in range(len(columns) - 1):
        apart = columns[edge][0] != columns[edge + 1][0]
        axis.axvline(edge + 0.5, color="white", linewidth=3.5 if apart else 0.6)
    for edge in range(len(memories) - 1):
        axis.axhline(edge + 0.5, color="white", linewidth=0.6)
    axis.spines[:].set_visible(False)
    for group in dict.fromkeys(group for group, _ in columns):
        places = [place for place, (own, _) in enumerate(columns) if own == group]
        axis.text(sum(places) / len(places), -0.62, group, ha="center", va="bottom", size=7.5)
    figure.colorbar(
        image, ax=axis, pad=0.015, aspect=25,
        label="score (%)",
    ).outline.set_visible(False)  # fmt: skip
    return figure


def _ordered(results: dict[str, Any], options: Options) -> list[tuple[str, str]]:
    """(group, task) in the order of the groups; tasks without a group last."""
    found = [(group, task) for group, own in (options.groups or {}).items() for task in own]
    grouped = {task for _, task in found}
    rest = [("", task) for task in names(results, "task") if task not in grouped]
    return found + rest


def _grid(
    results: dict[str, Any], options: Options
) -> dict[str, list[tuple[Point | None, Score | None]]]:
    """By task: the point and the score of every memory."""
    found = {}
    for _, task in _ordered(results, options):
        evaluation = evaluation_of(results, task, options.task)
        settings = settings_of(points_of(results, task=task), evaluation)
        labels = beyond(settings, options.beyond)
        points = [
            chosen(results, options.width, task=task, memory=memory)
            for memory in names(results, "memory")
        ]
        found[task] = [
            (one, score_at(one, evaluation, labels, options.condition)) for one in points
        ]
    return found


def _value(score: Score | None) -> float:
    return math.nan if score is None else 100 * score["mean"]
