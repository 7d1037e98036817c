"""What all pictures share: colours, figures, axes of lengths."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from memlm.evaluation.lengths import format_length
from memlm.evaluation.report.shape import number_of

COLOURS = {
    "on": "#0072b2",
    "off": "#d55e00",
    "reset": "#009e73",
    "swapped": "#cc79a7",
    "zeroed": "#e69f00",
    "changed": "#56b4e9",
    "absent": "#8a8f98",
}  # Okabe and Ito: told apart by colour-blind readers too
MARKERS = {
    "on": "o", "off": "s", "reset": "^", "swapped": "D", "zeroed": "v", "changed": "P",
    "absent": "X",
}  # fmt: skip
MODEL_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98", "#a6761d",
)  # fmt: skip
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "<", ">")
MODEL_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
GREY = "#8a8f98"
DARK = {
    "figure.facecolor": "#16181c",
    "savefig.facecolor": "#16181c",
    "axes.facecolor": "#16181c",
    "text.color": "#e8e6e3",
    "axes.labelcolor": "#e8e6e3",
    "axes.edgecolor": "#8a8f98",
    "xtick.color": "#e8e6e3",
    "ytick.color": "#e8e6e3",
    "grid.color": "#3a3e45",
    "legend.facecolor": "#16181c",
    "legend.edgecolor": "#3a3e45",
}
_MOST_TICKS = 9


@contextmanager
def styled(dark: bool) -> Iterator[None]:
    """Pictures drawn inside have the style of the report."""
    import matplotlib

    # Names of models are text, never formulas.
    style = {"font.size": 11, "axes.axisbelow": "line", "text.parse_math": False}
    with matplotlib.rc_context(style | (DARK if dark else {})):
        yield


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = False
) -> tuple[Any, list[Any]]:
    """A figure (inches) and its axes, row by row."""
    # Not pyplot: it keeps figures alive and picks a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def png(figure: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def colour(index: int) -> str:
    """Of a model."""
    return MODEL_COLOURS[index % len(MODEL_COLOURS)]


def marker(index: int) -> str:
    """Of a model; with the colour it tells 88 models apart."""
    return MODEL_MARKERS[index % len(MODEL_MARKERS)]


def line(index: int) -> Any:
    """Line style of a model."""
    return MODEL_LINES[index % len(MODEL_LINES)]


def shorten(name: str, most: int = 34) -> str:
    """A name that fits into a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def legend(figure: Any, axes: list[Any]) -> None:
    """Every line of the axes once, below the panels."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    longest = max(map(len, found), default=1)
    # About fourteen characters of the legend's size and its sample line fit into an inch.
    columns = int(max(1, min(len(found), figure.get_figwidth() * 14 // (longest + 9))))
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def error_bars(points: Sequence[dict[str, Any]], factor: float = 1.0) -> list[list[float]]:
    """Lengths of the bars below and above; none where a bound is unknown."""

    def bound(point: dict[str, Any], key: str) -> float:
        return point["value"] if point[key] is None else point[key]

    return [
        [max(0.0, factor * (point["value"] - bound(point, "low"))) for point in points],
        [max(0.0, factor * (bound(point, "high") - point["value"])) for point in points],
    ]


class Places:
    """Where settings stand on an x axis: by the logarithm of their number, else side by side."""

    def __init__(self, labels: Sequence[str]):
        numbers = [number_of(label) for label in labels]
        self.logarithmic = all(number is not None and number > 0 for number in numbers)
        self.values = dict(
            zip(labels, numbers if self.logarithmic else range(len(labels)), strict=True)
        )

    def at(self, label: str, shift: float = 0.0) -> float:
        """The place of a setting, moved by `shift` octaves or settings."""
        place = self.values[label]
        return place * 2.0**shift if self.logarithmic else place + shift

    def mark(self, axis: Any, name: str) -> None:
        """Ticks and label of an x axis."""
        places = list(self.values.values())
        if self.logarithmic:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
            margin = 2**0.35
            axis.set_xlim(min(places) / margin, max(places) * margin)
        elif places:
            axis.set_xlim(-0.5, len(places) - 0.5)
        step = -(-len(places) // _MOST_TICKS)
        labels = [tick_text(label, name) for label in self.values]
        turned = max(map(len, labels), default=0) > 6
        axis.set_xticks(
            places[::step],
            labels[::step],
            rotation=30 if turned else 0,
            ha="right" if turned else "center",
        )
        axis.set_xlabel(name)


def tick_text(label: str, axis: str) -> str:
    """Lengths in tokens as 4k."""
    return format_length(int(label)) if label.isdecimal() and "tokens" in axis else label
