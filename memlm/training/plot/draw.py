"""Panels as pictures: one colour per run, or per memory where there is a single run."""

import math
from collections.abc import Sequence
from typing import Any

from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.plots.style import (
    COLOURS,
    DARK,
    GREY,
    MARKERS,
    MODEL_COLOURS,
    colour,
    new_figure,
    png,
    shorten,
    styled,
)
from memlm.training.plot.panels import HELD_OUT, TRAINING, Line, Panel
from memlm.training.plot.runs import Run, smoothed

_COLUMNS = 3
_WIDTH, _HEIGHT = 4.4, 3.0  # inches of a panel
_CONDITION_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_NAMED_SITES = 6  # more have no room in a legend
_MARKED = 40  # points of a line that still have room for their markers
_STEEP = 50.0  # largest over smallest value from which a logarithmic axis shows more


def draw_page(panels: Sequence[Panel], runs: Sequence[Run], dark: bool = False) -> list[bytes]:
    """A PNG of each panel, without the names of the runs."""
    pictures = []
    with styled(dark):
        for panel in panels:
            figure, (axis,) = new_figure(_WIDTH, _HEIGHT)
            _draw(axis, panel, runs, dark)
            pictures.append(png(figure))
    return pictures


def draw_sheet(panels: Sequence[Panel], runs: Sequence[Run], title: str) -> bytes:
    """One PNG with all panels and the names of the runs above them."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with styled(dark=False):
        figure, axes = new_figure(_WIDTH * columns, _HEIGHT * rows + 0.9, rows, columns)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, runs, dark=False)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if len(runs) > 1:
            _name_runs(figure, runs, title)
        else:
            figure.suptitle(title, size=13)
        return png(figure)


def run_colours(runs: Sequence[Run]) -> list[str]:
    """A colour for each run, as #rrggbb."""
    if len(runs) <= len(MODEL_COLOURS):
        return [colour(number) for number in range(len(runs))]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["turbo"]
    return [to_hex(shades(0.05 + 0.9 * n / (len(runs) - 1))) for n in range(len(runs))]


def _name_runs(figure: Any, runs: Sequence[Run], title: str) -> None:
    from matplotlib.lines import Line2D

    names = [shorten(run.name, 48) for run in runs]
    handles = [Line2D([], [], color=shade, linewidth=3) for shade in run_colours(runs)]
    # About fourteen characters of the legend's size and its sample line fit into an inch.
    columns = int(figure.get_figwidth() * 14 // (max(map(len, names)) + 9))
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=max(1, min(len(runs), columns)),
        frameon=False,
        fontsize=10,
        title=title,
        title_fontsize=13,
    )


def _draw(axis: Any, panel: Panel, runs: Sequence[Run], dark: bool) -> None:
    sites = list(dict.fromkeys(line.site for line in panel.lines if line.site is not None))
    shades = _shades(panel, runs, sites, dark)
    logarithmic = _is_logarithmic(panel)
    shown: list[float] = []
    for line, shade in zip(panel.lines, shades, strict=True):
        values = _draw_line(axis, panel, line, shade, len(sites) > 1, logarithmic)
        shown += [
            value
            for step, value in zip(line.curve.steps, values, strict=True)
            if step >= panel.first_step
        ]
    if len(runs) == 1:
        _mark_stages(axis, runs[0], panel)
    _frame(axis, panel, logarithmic)
    if panel.first_step > 0:
        margin = 0.15 * (max(shown) - min(shown)) or 0.1
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
    _mark_steps(axis, panel, runs)
    _legend(axis, panel, shades, sites, one_run=len(runs) == 1, dark=dark)


def _shades(panel: Panel, runs: Sequence[Run], sites: Sequence[str], dark: bool) -> list[Any]:
    """The colour of each line."""
    if len(runs) > 1:
        colours = run_colours(runs)
        return [colours[line.run] for line in panel.lines]
    if not sites:
        return [COLOURS.get(line.kind, MODEL_COLOURS[0]) for line in panel.lines]
    of_sites = {site: colour(number) for number, site in enumerate(sites)}
    if len(sites) > _NAMED_SITES:
        from matplotlib import colormaps

        shades = colormaps["viridis"]
        of_sites = {
            site: shades(0.15 + 0.75 * n / (len(sites) - 1)) for n, site in enumerate(sites)
        }
    return [of_sites.get(line.site, _neutral(dark)) for line in panel.lines]


def _neutral(dark: bool) -> str:
    return DARK["text.color"] if dark else "#1c1e21"


def _is_logarithmic(panel: Panel) -> bool:
    values = [value for line in panel.lines for value in line.curve.values]
    return panel.scale == "log" and min(values) > 0 and max(values) > _STEEP * min(values)


def _draw_line(
    axis: Any, panel: Panel, line: Line, shade: Any, thin: bool, logarithmic: bool
) -> list[float]:
    """Draw a line; returns its values, smoothed where they are."""
    curve = line.curve
    values = [panel.factor * value for value in curve.values]
    style = _style(line.kind, len(curve.steps), _beside(panel))
    mean = thin and line.site is None
    if line.kind == TRAINING:
        smooth = smoothed(curve, logarithmic) if panel.smooth and not panel.jumps else None
        if smooth is not None:
            if not thin:
                faint = 0.25 if panel.first_step == 0 else 0.12
                axis.plot(curve.steps, values, color=shade, linewidth=0.6, alpha=faint)
            values = [panel.factor * value for value in smooth.values]
        style["linewidth"] = 2.0 if mean else 0.9 if thin else 1.5
    axis.plot(
        curve.steps,
        values,
        color=shade,
        drawstyle="steps-post" if panel.jumps else "default",
        **style,
    )
    return values


def _beside(panel: Panel) -> bool:
    """Whether held-out losses stand beside those of training."""
    return any(line.kind == TRAINING for line in panel.lines)


def _style(kind: str, points: int, beside: bool) -> dict[str, Any]:
    """How lines of a kind look, whatever their colour.

    Args:
        kind: of the line.
        points: that it has.
        beside: see `_beside`; then few points are not joined, as if nothing happened in between.
    """
    import matplotlib

    if kind == TRAINING:
        # A single step has no line.
        return {"linestyle": "-", "linewidth": 1.5, "marker": "." if points == 1 else ""}
    if kind == HELD_OUT:
        joined = not beside or points > _MARKED
        found = {"linestyle": "-" if joined else "", "linewidth": 1.2, "marker": "o"}
        if beside:  # a rim, to be seen on the line of the same colour
            rim = matplotlib.rcParams["axes.facecolor"]
            found |= {"markersize": 6, "markeredgecolor": rim, "markeredgewidth": 0.9}
        else:
            found |= {"markersize": 4.5}
    else:
        place = ALL_CONDITIONS.index(kind)
        found = {"linestyle": _CONDITION_LINES[place], "marker": MARKERS[kind]}
        found |= {"linewidth": 1.4, "markersize": 4}
    return found | ({"marker": ""} if points > _MARKED else {})


def _frame(axis: Any, panel: Panel, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    axis.set_title(shorten(panel.title, 46), size=10.5)
    axis.set_ylabel(panel.unit, size=10)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.35)
    values = [panel.factor * value for line in panel.lines for value in line.curve.values]
    low, high = min(values), max(values)
    # Not the usual formatter, which writes formulas; nor one with an offset.
    numbers = FuncFormatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(EngFormatter(sep="") if high >= 10_000 else numbers)
    if logarithmic:
        axis.set_yscale("log")
        decades = math.log10(high / low)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        axis.yaxis.set_major_formatter(numbers)
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif panel.shares:
        axis.set_ylim(-4, 104)
    elif panel.zero:
        low, high = min(0.0, low), max(0.0, high)
        margin = 0.06 * (high - low) or 1.0
        axis.set_ylim(low - margin * (low < 0), high + margin * (high > 0 or low == 0))
        if low < 0:
            axis.axhline(0, color=GREY, linewidth=0.8)


def _mark_steps(axis: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """The same steps in all panels, so that they can be compared."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    last = max(run.last_step or 0 for run in runs)
    margin = 0.02 * (last - panel.first_step) or 1.0
    axis.set_xlim(panel.first_step - margin, last + margin)
    axis.set_xlabel("step", size=10)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _mark_stages(axis: Any, run: Run, panel: Panel) -> None:
    """A dotted line where a stage of the curriculum begins, but the first."""
    for step, _ in run.stages[1:]:
        if step >= panel.first_step:
            axis.axvline(step, color=GREY, linewidth=0.8, linestyle=":")


def _legend(
    axis: Any, panel: Panel, shades: Sequence[Any], sites: list[str], one_run: bool, dark: bool
) -> None:
    """What line styles mean where there are several, and the memories of a single run."""
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(line.kind for line in panel.lines))
    entries: dict[str, Any] = {}
    if len(sites) > 1:
        named = sites if len(sites) <= _NAMED_SITES else [sites[0], sites[-1]]
        for line, shade in zip(panel.lines, shades, strict=True):
            if line.site in named:
                entries.setdefault(shorten(line.site, 22), Line2D([], [], color=shade))
        entries["mean"] = Line2D([], [], color=_neutral(dark), linewidth=2)
    if len(kinds) > 1:
        own = {line.kind: shade for line, shade in zip(panel.lines, shades, strict=True)}
        for kind in kinds:
            shade = own[kind] if one_run and not sites else _neutral(dark)
            text = kind if kind in (TRAINING, HELD_OUT, "changed", "absent") else f"memory {kind}"
            entries[text] = Line2D([], [], color=shade, **_style(kind, 2, _beside(panel)))
    if entries:
        axis.legend(list(entries.values()), list(entries), frameon=False, fontsize=8)
