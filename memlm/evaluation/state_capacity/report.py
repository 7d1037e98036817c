"""Table and plot of how many pairs rules hold."""

from typing import Any

from memlm.evaluation.report.numbers import bytes_text
from memlm.evaluation.suite.reports.drawing import (
    counts_axis,
    draw_legend,
    draw_scores,
    logarithmic_axis,
    panels,
    paper_style,
    save,
)
from memlm.evaluation.suite.reports.reading import markdown

_TITLES = {
    "nearest": "nearest value is right",
    "exact": "read at cosine 0.9",
    "rewritten": "newer of two values is nearest",
}


def make_table(results: dict[str, Any]) -> str:
    """A row for every rule and number of channels; step sizes in the order of the questions."""
    header = ["rule", "channels", "state", *(f"pairs, {title}" for title in _TITLES.values())]
    header += ["bytes per pair", "step sizes"]
    rows = []
    for rule in results["rules"]:
        for size in rule["sizes"]:
            found = size["capacities"]
            pairs = found["nearest"]["pairs"]
            each = f"{size['state_bytes'] / pairs:,.0f}" if pairs else "-"
            steps = (f"{found[question]['step_size']:g}" for question in _TITLES)
            rows.append(
                [
                    rule["title"],
                    str(size["channels"]),
                    bytes_text(size["state_bytes"]),
                    *(f"{found[question]['pairs']:,}" for question in _TITLES),
                    each,
                    " / ".join(steps) if rule["step_sizes"] else "-",
                ]
            )
    return markdown(header, rows)


def draw(results: dict[str, Any]) -> bytes:
    """Pairs against bytes of state, a panel for every question; a PNG."""
    from matplotlib.ticker import LogLocator

    titles = [rule["title"] for rule in results["rules"]]
    sizes = [size["state_bytes"] for rule in results["rules"] for size in rule["sizes"]]
    with paper_style():
        figure, axes = panels(len(_TITLES), len(titles))
        for axis, (question, title) in zip(axes, _TITLES.items(), strict=True):
            for number, rule in enumerate(results["rules"]):
                counts = [
                    size["capacities"][question]["pairs"] or float("nan") for size in rule["sizes"]
                ]
                scores = [{"mean": count, "low": count, "high": count} for count in counts]
                places = [size["state_bytes"] for size in rule["sizes"]]
                draw_scores(axis, number, rule["title"], places, scores, 1.0)
            logarithmic_axis(axis.xaxis)
            axis.xaxis.set_major_locator(LogLocator())
            axis.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
            logarithmic_axis(axis.yaxis)
            counts_axis(axis.xaxis)
            counts_axis(axis.yaxis)
            axis.grid(alpha=0.35, linewidth=0.5)
            axis.set_title(title)
            axis.set_xlabel("bytes of state")
        axes[0].set_ylabel("pairs")
        draw_legend(figure, axes, titles, {})
        return save(figure)
