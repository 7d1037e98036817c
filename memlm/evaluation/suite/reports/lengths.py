"""Score against length: how far beyond the trained length each memory holds."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.evaluation.plots.style import GREY, Places
from memlm.evaluation.report.numbers import MISSING
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
    axis_of,
    bold_best,
    check_chance,
    check_condition,
    check_positive,
    chosen,
    chosen_points,
    count_text,
    evaluation_of,
    markdown,
    metric_of,
    names,
    points_of,
    score_at,
    score_text,
    settings_of,
)

_SPREAD = 0.4  # octaves or settings, over which the memories' points at a setting are laid out


@strict
@dataclass
class Options:
    """Options of scores by length.

    Attributes:
        task: the evaluation task; by default the only one, or the one with the suite task's name.
        condition: of the evaluation.
        width: of the models; by default the largest of each memory.
        trained: the longest trained setting.
        chance: the score of guesses.
        loss: scores are losses: lower is better.
    """

    task: str | None = None
    condition: str = "on"
    width: int | None = None
    trained: int | None = None
    chance: float | None = None
    loss: bool = False

    def check(self) -> None:
        """Raise UserError for values that are not valid."""
        check_condition(self.condition)
        check_chance(self.chance, self.loss)
        check_positive(width=self.width, trained=self.trained)


def shown_points(results: dict[str, Any], options: Options) -> list[Point]:
    """Those of the width, of every task and memory."""
    return chosen_points(results, options.width)


def make_table(results: dict[str, Any], options: Options) -> str:
    """A row for every memory and a column for every setting, a table for every task."""
    tables, memories = [], names(results, "memory")
    for task in names(results, "task"):
        evaluation = evaluation_of(results, task, options.task)
        points = [chosen(results, options.width, task=task, memory=one) for one in memories]
        settings = settings_of(points_of(results, task=task), evaluation)
        columns = []
        for setting in settings:
            scores = [score_at(one, evaluation, [setting], options.condition) for one in points]
            texts = [
                score_text(results, one, score, options.loss)
                for one, score in zip(points, scores, strict=True)
            ]
            columns.append(bold_best(texts, scores, options.loss))
        if not settings:  # every model failed
            columns = [[score_text(results, one, None) for one in points]]
        rows = [
            [
                memory,
                *_sizes(point),
                *(column[index] for column in columns),
            ]
            for index, (memory, point) in enumerate(zip(memories, points, strict=True))
        ]
        unit = "" if options.loss else " (%)"
        header = ["memory", "width", "parameters", "learning rate"]
        header += [f"{setting}{unit}" for setting in settings] or ["score"]
        title = f"**{task}**\n\n" if len(names(results, "task")) > 1 else ""
        tables.append(title + markdown(header, rows))
    return "\n\n".join(tables)


def draw(results: dict[str, Any], options: Options) -> Any:
    """A panel for every task; the figure."""
    memories, tasks = names(results, "memory"), names(results, "task")
    figure, axes = panels(len(tasks), len(memories))
    factor = 1.0 if options.loss else 100.0
    absent: dict[str, list[str]] = {}
    for axis, task in zip(axes, tasks, strict=True):
        evaluation = evaluation_of(results, task, options.task)
        settings = settings_of(points_of(results, task=task), evaluation)
        places = Places(settings)
        for number, memory in enumerate(memories):
            point = chosen(results, options.width, task=task, memory=memory)
            scores = [score_at(point, evaluation, [one], options.condition) for one in settings]
            if any(score is not None for score in scores):
                # Side by side: memories that solve a task would hide each other.
                shift = _SPREAD * (number / (len(memories) - 1) - 0.5) if len(memories) > 1 else 0
                at = [places.at(label, shift) for label in settings]
                draw_scores(axis, number, memory, at, scores, factor)
            else:
                why = FAILED if point is not None and point["error"] else MISSING_POINT
                absent.setdefault(memory, []).append(why)
        if settings:
            places.mark(axis, axis_of(evaluation))
        if options.trained is not None and settings and places.logarithmic:
            axis.axvline(options.trained, color=GREY, linewidth=0.9, linestyle="--",
                         label="trained length", zorder=1)  # fmt: skip
        score_axis(axis, options.loss)
        axis.set_title(task)
    axes[0].set_ylabel(metric_of(evaluation))
    draw_chance(axes, options.chance, factor)
    said = {memory: _remark(reasons, len(tasks)) for memory, reasons in absent.items()}
    draw_legend(figure, axes, memories, said)
    return figure


def _sizes(point: Point | None) -> list[str]:
    if point is None:
        return [MISSING] * 3
    return [str(point["width"]), count_text(point["parameters"]), f"{point['learning_rate']:g}"]


def _remark(reasons: list[str], tasks: int) -> str:
    """Why a memory has no line, and in how many of the panels."""
    counts = Counter(reasons)
    return "; ".join(
        why if count == tasks else f"{why} in {count} of {tasks}" for why, count in counts.items()
    )
