"""Bits of facts that models keep in their weights, against parameters and operations.

Read from a point's cells: measures[evaluation task][setting][condition]["bits"], which a generator
of facts counts as facts * max(0, entropy of an answer - loss of an answer), in bits.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.errors import UserError
from memlm.evaluation.report.numbers import MISSING
from memlm.evaluation.report.shape import in_order
from memlm.evaluation.suite.reports.drawing import (
    counts_axis,
    draw_legend,
    draw_scores,
    logarithmic_axis,
    panels,
)
from memlm.evaluation.suite.reports.reading import (
    FAILED,
    MISSING_POINT,
    Point,
    Score,
    bold_best,
    cells_of,
    check_condition,
    check_setting,
    count_text,
    evaluation_of,
    markdown,
    names,
    points_of,
    some_failed,
    spread,
)


@strict
@dataclass
class Options:
    """Options of capacities.

    Attributes:
        task: the evaluation task; by default the only one, or the one with the suite task's name.
        setting: its label, or "last".
        condition: of the evaluation.
    """

    task: str | None = None
    setting: str | int = "last"
    condition: str = "on"

    def check(self) -> None:
        """Raise UserError for a condition that there is not, and for a mean over settings."""
        check_condition(self.condition)
        if self.setting == "mean":
            raise UserError("report.setting: bits of several settings have no mean; name one")


def shown_points(results: dict[str, Any], options: Options) -> list[Point]:
    """All."""
    return results["points"]


def bits_of(results: dict[str, Any], point: Point, options: Options) -> Score | None:
    """Bits stored, mean and range over the seeds; None where none was measured.

    Raises:
        UserError: for a setting that was not evaluated.
    """
    evaluation = evaluation_of(results, point["task"], options.task)
    found = []
    for cell in cells_of(results, point):
        measures = cell["measures"].get(evaluation, {})
        setting = check_setting(str(options.setting), in_order(measures))
        bits = measures.get(setting, {}).get(options.condition, {}).get("bits")
        if cell["error"] is None and bits is not None:
            found.append(bits)
    return spread(found)


def make_table(results: dict[str, Any], options: Options) -> str:
    """A row for every memory and width, a table for every task."""
    tables = []
    for task in names(results, "task"):
        points = [
            point
            for memory in names(results, "memory")
            for point in points_of(results, task=task, memory=memory)
        ]
        bits = [bits_of(results, point, options) for point in points]
        per = {
            key: [_divided(score, point[key]) for score, point in zip(bits, points, strict=True)]
            for key in ("parameters", "flops_per_token")
        }
        columns = [
            bold_best(
                [
                    _text(results, point, score, form)
                    for score, point in zip(scores, points, strict=True)
                ],
                scores,
            )
            for scores, form in (
                (bits, ",.0f"),
                (per["parameters"], ".3f"),
                (per["flops_per_token"], ".3f"),
            )
        ]
        rows = [
            [
                point["memory"],
                str(point["width"]),
                f"{point['learning_rate']:g}",
                count_text(point["parameters"]),
                count_text(point["flops_per_token"]),
                *(column[index] for column in columns),
            ]
            for index, point in enumerate(points)
        ]
        header = ["memory", "width", "learning rate", "parameters", "FLOPs per token"]
        header += ["bits stored", "bits per parameter", "bits per FLOP of a token"]
        title = f"**{task}**\n\n" if len(names(results, "task")) > 1 else ""
        tables.append(title + markdown(header, rows))
    return "\n\n".join(tables)


def draw(results: dict[str, Any], options: Options) -> Any:
    """Two panels for every task, by parameters and by operations; the figure."""
    memories, tasks = names(results, "memory"), names(results, "task")
    figure, axes = panels(2 * len(tasks), len(memories))
    shown = [bits_of(results, point, options) for point in results["points"]]
    # A logarithmic axis has no place for a model that keeps nothing.
    positive = all(one is None or one["low"] > 0 for one in shown)
    wanted = [(task, key) for task in tasks for key in ("parameters", "flops_per_token")]
    remarks: dict[str, set[str]] = {}
    for axis, (task, key) in zip(axes, wanted, strict=True):
        for number, memory in enumerate(memories):
            pairs = []
            for point in points_of(results, task=task, memory=memory):
                score = bits_of(results, point, options)
                if score is None:
                    why = FAILED if point["error"] is not None else MISSING_POINT
                    remarks.setdefault(memory, set()).add(f"{point['width']} {why}")
                if point[key] is not None:
                    pairs.append((point[key], score))
            pairs.sort(key=lambda pair: pair[0])
            if any(score is not None for _, score in pairs):
                draw_scores(axis, number, memory, *zip(*pairs, strict=True), 1.0)
        logarithmic_axis(axis.xaxis)
        if positive:
            logarithmic_axis(axis.yaxis)
        else:
            axis.set_ylim(0, max(10.0, 1.05 * max(one["high"] for one in shown if one)))
        counts_axis(axis.xaxis)
        counts_axis(axis.yaxis)
        axis.grid(alpha=0.35, linewidth=0.5)
        axis.set_xlabel("parameters" if key == "parameters" else "FLOPs per token")
        if len(tasks) > 1:
            axis.set_title(task)
    axes[0].set_ylabel("bits stored")
    said = {memory: ", ".join(sorted(texts)) for memory, texts in remarks.items()}
    draw_legend(figure, axes, memories, said)
    return figure


def _divided(score: Score | None, by: int) -> Score | None:
    return None if score is None or not by else {key: score[key] / by for key in score}


def _text(results: dict[str, Any], point: Point, score: Score | None, form: str) -> str:
    if point["error"] is not None:
        return FAILED
    if score is None:
        return MISSING
    value, low, high = (format(score[key], form) for key in ("mean", "low", "high"))
    text = value if score["low"] == score["high"] else f"{value} [{low}, {high}]"
    return f"{text} †" if some_failed(results, point) else text
