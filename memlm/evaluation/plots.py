"""The pictures of a report, as PNG bytes."""

import io
from typing import Any

COLOURS = {
    "on": "#0072b2",
    "off": "#d55e00",
    "reset": "#009e73",
    "swapped": "#cc79a7",
    "zeroed": "#e69f00",
}  # Okabe and Ito: told apart by colour-blind readers too
MARKERS = {"on": "o", "off": "s", "reset": "^", "swapped": "D", "zeroed": "v"}
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


def draw_plots(results: dict[str, Any], dark: bool = False) -> dict[str, bytes]:
    """File name -> PNG of every plot the tasks of `results` have."""
    import matplotlib

    style = {"font.size": 11, "axes.grid": False, "axes.axisbelow": "line"}
    with matplotlib.rc_context(style | (DARK if dark else {})):
        plots = {}
        tasks = results["tasks"]
        if "needle" in tasks:
            plots["needle_heatmap.png"] = _heatmaps(results, tasks["needle"])
            plots["needle_recall.png"] = _recall(results, tasks["needle"], "Needle in real text")
        if "mqar" in tasks:
            plots["mqar_accuracy.png"] = _recall(
                results, tasks["mqar"], "Multi-query associative recall"
            )
        if "perplexity" in tasks:
            plots["perplexity_by_position.png"] = _by_position(results, tasks["perplexity"])
    return plots


def draw_surprise(surprise: dict[str, Any], window: int = 32, dark: bool = False) -> bytes:
    """PNG of the surprise of each memory by position, the mean over rows and heads.

    Args:
        surprise: tensors [B, T, H] by name, as `memlm.memory.records.record_surprise` gives them.
        window: tokens of the running mean.
        dark: for dark backgrounds.
    """
    import matplotlib

    with matplotlib.rc_context({"font.size": 11} | (DARK if dark else {})):
        figure, (axis,) = _figure(7.0, 3.9)
        for name, values in surprise.items():
            mean = values.double().mean((0, 2))
            size = min(window, len(mean))
            smooth = mean.unfold(0, size, 1).mean(-1)
            axis.plot(range(size - 1, len(mean)), smooth.tolist(), label=name, linewidth=1)
        axis.set_yscale("log")
        axis.set_xlabel("position (tokens)")
        axis.set_ylabel(f"surprise |M(k) - v|², mean of {window} tokens")
        axis.grid(axis="y", alpha=0.4)
        axis.legend(frameon=False, fontsize=9)
        return _png(figure)


def _figure(width: float, height: float, columns: int = 1, sharey: bool = True):
    # Not pyplot: it keeps figures alive and picks a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _heatmaps(results: dict[str, Any], task: dict[str, Any]) -> bytes:
    lengths = sorted({cell["length"] for cell in task["cells"]})
    depths = sorted({cell["depth"] for cell in task["cells"]})
    conditions = results["conditions"]
    columns = len(conditions)
    figure, axes = _figure(
        2.2 + columns * max(2.0, 0.62 * len(lengths)), 1.9 + 0.5 * len(depths), columns
    )
    for axis, condition in zip(axes, conditions, strict=True):
        grid = [
            [
                100 * cell["score"]["value"]
                for length in lengths
                for cell in task["cells"]
                if (cell["length"], cell["depth"], cell["condition"]) == (length, depth, condition)
            ]
            for depth in depths
        ]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                colour = "black" if value > 55 else "white"
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=colour, size=10
                )
        axis.set_title(f"memory {condition}", size=11)
        axis.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)
        axis.set_yticks([i + 0.5 for i in range(len(depths) - 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="minor", length=0)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    figure.supxlabel("prompt length (tokens)", size=11)
    axes[0].set_ylabel(
        f"needle depth (% of the text up to\n{task['least_distance_tokens']} tokens before the end)"
    )
    figure.colorbar(image, ax=list(axes), label="recall (% exact matches)", pad=0.02)
    figure.suptitle("Needle in real text: recall by length and depth", size=12)
    return _png(figure)


def _interval(points: list[dict[str, float]], factor: float = 1.0) -> list[list[float]]:
    """Lower and upper error bars."""
    return [
        [max(0.0, factor * (p["value"] - _or(p["low"], p["value"]))) for p in points],
        [max(0.0, factor * (_or(p["high"], p["value"]) - p["value"])) for p in points],
    ]


def _or(bound: float | None, value: float) -> float:
    return value if bound is None else bound


def _recall(results: dict[str, Any], task: dict[str, Any], title: str) -> bytes:
    settings = list(task["scores"])
    conditions = results["conditions"]
    figure, (axis,) = _figure(7.0, 3.9)
    width = 0.8 / len(conditions)
    for place, condition in enumerate(conditions):
        points = [task["scores"][setting][condition] for setting in settings]
        centres = [i + (place - (len(conditions) - 1) / 2) * width for i in range(len(settings))]
        axis.bar(
            centres,
            [100 * point["value"] for point in points],
            width * 0.92,
            yerr=_interval(points, 100.0),
            capsize=2.5,
            color=COLOURS[condition],
            ecolor="#8a8f98",
            label=f"memory {condition}",
        )
    axis.set_xticks(range(len(settings)), settings)
    axis.set_xlabel(task["axis"])
    axis.set_ylabel(f"{task['metric']}, 95 % interval")
    axis.set_ylim(0, 105)
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.4)
    axis.set_title(f"{title}: {task['metric'].split(' ')[0]} by condition", size=12)
    figure.legend(loc="outside lower center", ncols=len(conditions), frameon=False, fontsize=9)
    return _png(figure)


def _by_position(results: dict[str, Any], task: dict[str, Any]) -> bytes:
    ranges = [label for label in task["scores"] if label != "all"]
    conditions = results["conditions"]
    figure, (left, right) = _figure(10.5, 4.3, 2, sharey=False)
    for place, condition in enumerate(conditions):
        centres = [i + (place - (len(conditions) - 1) / 2) * 0.08 for i in range(len(ranges))]
        style = {"color": COLOURS[condition], "marker": MARKERS[condition], "capsize": 2.5}
        points = [task["scores"][label][condition] for label in ranges]
        values = [point["value"] for point in points]
        left.errorbar(centres, values, yerr=_interval(points), label=f"memory {condition}", **style)
        if condition != "on":
            points = [task["memory_gain"][label][condition] for label in ranges]
            values = [point["value"] for point in points]
            right.errorbar(centres, values, yerr=_interval(points), **style)
    left.set_title("Loss on held-out text", size=12)
    left.set_ylabel("loss (bits per byte), 95 % interval")
    right.set_title("Extra loss over memory on, same documents", size=12)
    right.set_ylabel("extra loss (bits per byte), 95 % interval")
    right.axhline(0, color=COLOURS["on"], linewidth=1)
    for axis in (left, right):
        axis.set_xticks(range(len(ranges)), ranges, rotation=30, ha="right")
        axis.set_xlabel("position in the document (tokens)")
        axis.grid(axis="y", alpha=0.4)
    figure.legend(loc="outside lower center", ncols=len(conditions), frameon=False, fontsize=9)
    return _png(figure)
