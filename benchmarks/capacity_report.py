"""Tables and plot of benchmarks.capacity, from its runs.

A result holds the settings of a run (row, facts, learning_rate, seed, steps) and what was measured
(bits, accuracy, seconds, multiply_adds, parameters).
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

Result = dict[str, Any]
MEASURES: dict[str, Callable[[Result], float]] = {
    "bits": lambda result: result["bits"],
    "bits per multiply-add": lambda result: result["bits"] / result["multiply_adds"],
    "bits per parameter": lambda result: result["bits"] / result["parameters"],
    "bits per second": lambda result: result["bits"] / result["seconds"],
}


def best_by_seed(
    results: Sequence[Result], row: str, measure: str = "bits", facts: int | None = None
) -> dict[int, Result]:
    """By seed, the row's run with most of a measure over all learning rates, and over all numbers
    of facts unless one is given."""
    best: dict[int, Result] = {}
    for result in results:
        if result["row"] != row or facts not in (None, result["facts"]):
            continue
        seed = result["seed"]
        if seed not in best or MEASURES[measure](result) > MEASURES[measure](best[seed]):
            best[seed] = result
    return dict(sorted(best.items()))


def ratios(results: Sequence[Result], dense: str, memory: str, measure: str) -> list[float]:
    """Seed by seed, the most that row `memory` has of a measure over the most of row `dense`."""
    low, high = (best_by_seed(results, row, measure) for row in (dense, memory))
    value = MEASURES[measure]
    return [value(high[seed]) / value(low[seed]) for seed in high if seed in low]


def step_seconds(results: Sequence[Result], row: str) -> float:
    """Processor time of a training step of a row, the median of its runs."""
    found = (result for result in results if result["row"] == row)
    return statistics.median(result["seconds"] / result["steps"] for result in found)


def facts_table(results: Sequence[Result]) -> str:
    """A line per row and number of facts, each seed at its best learning rate."""
    lines = []
    for row in dict.fromkeys(result["row"] for result in results):
        for facts in _facts(results, row):
            found = list(best_by_seed(results, row, facts=facts).values())
            rates = sorted({result["learning_rate"] for result in found})
            lines.append(
                [
                    row,
                    facts,
                    len(found),
                    ", ".join(f"{rate:g}" for rate in rates),
                    f"{100 * statistics.mean(result['accuracy'] for result in found):.1f} %",
                    _spread([result["bits"] / 1000 for result in found], 1),
                    f"{facts * 8 / 1000:.1f}",
                    f"{statistics.mean(result['seconds'] for result in found):.1f}",
                ]
            )
    header = (
        *("row", "facts", "seeds", "best learning rate", "right"),
        *("kbit stored", "kbit to store", "CPU s"),
    )
    return report.table(header, lines)


def comparison_table(results: Sequence[Result], dense: str, memory: str) -> str:
    """A line per row, each seed at its best, and how many times as much `memory` has."""
    lines = []
    for row in dict.fromkeys(result["row"] for result in results):
        best = list(best_by_seed(results, row).values())
        lines.append(
            [
                row,
                f"{best[0]['multiply_adds']:,}",
                f"{best[0]['parameters']:,}",
                _spread([result["bits"] / 1000 for result in best], 1),
                *(_best(results, row, measure) for measure in list(MEASURES)[1:]),
                f"{1000 * step_seconds(results, row):.2f}",
            ]
        )
    found = {row: best_by_seed(results, row) for row in (dense, memory)}
    sizes = [
        next(iter(found[memory].values()))[name] / next(iter(found[dense].values()))[name]
        for name in ("multiply_adds", "parameters")
    ]
    lines.append(
        [
            f"{memory} / {dense}",
            *(f"{size:.3f}" for size in sizes),
            *(_spread(ratios(results, dense, memory, measure), 2) for measure in MEASURES),
            f"{step_seconds(results, memory) / step_seconds(results, dense):.2f}",
        ]
    )
    header = (
        *("row", "multiply-adds", "parameters", "kbit stored"),
        *("bits per multiply-add", "bits per parameter", "bits per CPU second"),
        "CPU ms per step",
    )
    return report.table(header, lines)


def _best(results: Sequence[Result], row: str, measure: str) -> str:
    best = best_by_seed(results, row, measure).values()
    values = [MEASURES[measure](result) for result in best]
    return _spread(values, 0 if measure == "bits per second" else 2)


def _facts(results: Sequence[Result], row: str) -> list[int]:
    return sorted({result["facts"] for result in results if result["row"] == row})


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean over the seeds, and their range where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def plot(results: Sequence[Result], dense: str, memory: str, path: Path) -> Path:
    """Bits over the number of facts, and the ratios per multiply-add, parameter and second."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    most = max(result["facts"] for result in results)
    left.plot([0, most], [0, 8 * most / 1000], "--", color="grey", label="all facts, 8 bits each")
    for index, row in enumerate(dict.fromkeys(result["row"] for result in results)):
        facts = _facts(results, row)
        bits = [
            [result["bits"] / 1000 for result in best_by_seed(results, row, facts=n).values()]
            for n in facts
        ]
        rates = {result["learning_rate"] for result in results if result["row"] == row}
        label = f"{row} (best of {len(rates)} learning rates)" if len(rates) > 1 else row
        style = "o-" if row in (dense, memory) else "x"
        left.plot(facts, [statistics.mean(b) for b in bits], style, color=f"C{index}", label=label)
        left.fill_between(
            facts, [min(b) for b in bits], [max(b) for b in bits], color=f"C{index}", alpha=0.2
        )
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    left.set(xlabel="facts to learn", ylabel="stored (kbit)", xlim=(0, None), ylim=(0, None))
    left.set_title("Bits stored at equal multiply-adds")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)

    names = list(MEASURES)[1:]
    values = [ratios(results, dense, memory, name) for name in names]
    means = [statistics.mean(v) for v in values]
    spread = [
        [mean - min(v) for mean, v in zip(means, values, strict=True)],
        [max(v) - mean for mean, v in zip(means, values, strict=True)],
    ]
    labels = [name.replace("bits per ", "per ").replace("second", "CPU second") for name in names]
    bars = right.bar(labels, means, yerr=spread, capsize=4, color="C1", alpha=0.8)
    right.bar_label(bars, [f"{mean:.2f}x" for mean in means], padding=4)
    right.axhline(1, color="C0", ls="--", label=f"as much as {dense}")
    right.set_ylim(0, 1.2 * max(max(v) for v in values))
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    right.set(ylabel=f"bits stored, {memory} / {dense}")
    right.set_title("Each at its best, mean and range over seeds")
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle("Random facts stored by one layer: key of 64 channels to one of 256 classes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
