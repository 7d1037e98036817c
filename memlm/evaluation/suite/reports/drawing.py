"""What the pictures of suites share: the style of a paper's figures, lines of memories, legends."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from memlm.evaluation.plots.style import GREY, colour, line, marker, new_figure, shorten, styled
from memlm.evaluation.suite.reports.reading import Score

SINGLE, DOUBLE = 3.4, 7.0  # inches, columns of a paper
_MOST_IN_SINGLE = 6  # memories
_DOTS_PER_INCH = 200
_LEGEND_LINE = 0.155  # inches
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Pictures drawn inside can be printed at their size."""
    import matplotlib

    with styled(dark=False), matplotlib.rc_context(_STYLE):
        yield


def save(figure: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def panels(count: int, memories: int, sharey: bool = True) -> tuple[Any, list[Any]]:
    """A figure with room for panels of lines, and their axes.

    One panel of few memories is as wide as a column, all else as the page.
    """
    columns = min(count, 4) if count != 6 else 3
    rows = -(-count // columns)
    width = SINGLE if count == 1 and memories <= _MOST_IN_SINGLE else DOUBLE
    each = 2.3 if columns < 3 else 1.9
    figure, axes = new_figure(width, rows * each + 0.3, rows, columns, sharey)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def draw_scores(
    axis: Any,
    number: int,
    label: str,
    places: Sequence[float],
    scores: Sequence[Score | None],
    factor: float,
) -> None:
    """The line of a memory with the range of its seeds as bars; a gap where a score is missing.

    Args:
        axis: to draw on.
        number: of the memory in the suite, which gives colour, marker and line.
        label: its name.
        places: on the x axis.
        scores: one for each place.
        factor: of the scores, such as 100 for percentages.
    """
    nan = float("nan")
    means = [nan if score is None else factor * score["mean"] for score in scores]
    bars = [
        [0.0 if score is None else max(0.0, factor * (score["mean"] - score["low"]))
         for score in scores],
        [0.0 if score is None else max(0.0, factor * (score["high"] - score["mean"]))
         for score in scores],
    ]  # fmt: skip
    axis.errorbar(
        places,
        means,
        yerr=bars,
        color=colour(number),
        marker=marker(number),
        linestyle=line(number),
        # Those below stay visible where markers lie on each other.
        markersize=max(4.0, 6.0 - 0.2 * number) + 2.0 * (marker(number) == "*"),
        markeredgecolor="white",
        markeredgewidth=0.4,
        linewidth=1.1,
        elinewidth=0.8,
        capsize=1.5,
        label=label,
        zorder=3,
        clip_on=False,
    )


def score_axis(axis: Any, loss: bool) -> None:
    """Percentages from 0 to 100, or losses as they are; lines at the ticks."""
    if not loss:
        axis.set_ylim(-4, 104)
        axis.set_yticks(range(0, 101, 25))
    axis.grid(axis="y", alpha=0.35, linewidth=0.5)


def logarithmic_axis(axis: Any) -> None:
    """Make an x or y axis logarithmic, with ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axis.set_minor_locator(NullLocator())


def counts_axis(axis: Any) -> None:
    """Write the ticks as 500, 20k, 3M."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def draw_chance(axes: Sequence[Any], chance: float | None, factor: float) -> None:
    """A level line."""
    for axis in axes if chance is not None else []:
        axis.axhline(factor * chance, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.5)),
                     label="chance", zorder=1)  # fmt: skip


def draw_legend(figure: Any, axes: Sequence[Any], order: Sequence[str], remarks: dict[str, str]):
    """Memories in the order of the suite, then the levels, below all panels.

    Args:
        figure: of the axes.
        axes: with labelled lines.
        order: all memories; one without a line is named too.
        remarks: what is said behind the names of some, such as "failed".
    """
    from matplotlib.lines import Line2D

    handles = {}
    for number, name in enumerate(order):
        remark = f" ({remarks[name]})" if name in remarks else ""
        handles[f"{shorten(name)}{remark}"] = Line2D(
            [], [], color=colour(number), marker=marker(number), linestyle=line(number),
            markersize=4.5, linewidth=1.1,
        )  # fmt: skip
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in order:
                handles.setdefault(label, handle)
    # Twenty-one letters of the legend's size fit into an inch; the sample line takes eleven.
    longest = max(map(len, handles))
    columns = int(max(1, min(len(handles), figure.get_figwidth() * 21 // (longest + 11))))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (lines + 0.5))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.8,
        columnspacing=1.2,
    )
