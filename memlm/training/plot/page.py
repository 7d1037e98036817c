"""The pictures of some runs as one HTML page that needs nothing else."""

from collections.abc import Sequence
from itertools import groupby

from memlm.evaluation.report.html import picture, table, text
from memlm.evaluation.report.numbers import MISSING, rate_text
from memlm.evaluation.report.style import PAGE
from memlm.training.plot.draw import draw_page, run_colours
from memlm.training.plot.panels import Panel
from memlm.training.plot.runs import Run

# The names of the runs stay in sight while the pictures go by.
_LEGEND = (
    "position: sticky; top: 0; background: var(--back); border-bottom: 1px solid var(--line); "
    "display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; padding: 0.5rem 0; max-height: 6.5rem; "
    "overflow-y: auto; font-size: 0.9rem; z-index: 1"
)
_SWATCH = (
    "display: inline-block; width: 1.4rem; height: 0.3rem; border-radius: 2px; "
    "vertical-align: middle; margin-right: 0.4rem; background: {}"
)

_GRID = "display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr))"


def render_page(panels: Sequence[Panel], runs: Sequence[Run], title: str) -> str:
    """The page; its pictures follow the reader's choice of a light or a dark screen."""
    names = [str(number) for number in range(len(panels))]
    light = dict(zip(names, draw_page(panels, runs), strict=True))
    dark = dict(zip(names, draw_page(panels, runs, dark=True), strict=True))
    body = [f"<h1>{text(title)}</h1>"]
    if len(runs) > 1:
        body.append(_legend(runs))
    body.append(_summary(runs))
    numbered = zip(names, panels, strict=True)
    for section, found in groupby(numbered, key=lambda entry: entry[1].section):
        body.append(f"<h2>{text(section)}</h2>")
        pictures = (picture(name, panel.title, light, dark) for name, panel in found)
        body.append(f'<div style="{_GRID}">{"".join(pictures)}</div>')
    return PAGE.format(title=text(title), body="\n".join(body))


def _legend(runs: Sequence[Run]) -> str:
    entries = (
        f'<span><span style="{_SWATCH.format(shade)}"></span>{text(run.name)}</span>'
        for run, shade in zip(runs, run_colours(runs), strict=True)
    )
    return f'<div style="{_LEGEND}">{"".join(entries)}</div>'


def _summary(runs: Sequence[Run]) -> str:
    """Where each run stands."""
    header = ["run", "last step", "training, bits", "held-out, bits", "memory off", "tokens/s"]
    rows = [
        [
            text(run.name),
            MISSING if run.last_step is None else f"{run.last_step:,.0f}",
            _last(run.training, "bits"),
            _last(run.evaluations, "bits"),
            _last(run.evaluations, "bits_off"),
            rate_text(_last_value(run.training, "tokens_per_second")),
        ]
        for run in runs
    ]
    used = [
        column
        for column in range(len(header))
        if column < 2 or any(row[column] != MISSING for row in rows)
    ]
    return table([header[c] for c in used], [[row[c] for c in used] for row in rows])


def _last(curves: dict, key: str) -> str:
    value = _last_value(curves, key)
    return MISSING if value is None else f"{value:.3f}"


def _last_value(curves: dict, key: str) -> float | None:
    return curves[key].values[-1] if key in curves else None
