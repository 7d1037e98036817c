"""Tables and plot of benchmarks.cache_sizes, from its runs."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from memlm.evaluation.statistics import Estimate, bootstrap_mean

BASE, CACHE = "window", "window and cache"
Runs = Mapping[str, Mapping[str, Any]]


def difference(runs: Runs, seed: int, first: tuple[str, int], second: tuple[str, int]) -> Estimate:
    """Bits per byte that `second` has less than `first`: the mean of paired differences.

    Args:
        runs: by key.
        seed: of both runs.
        first, second: kind of model and size of the cache.
    """
    values = [np.asarray(_read(runs, seed, *one)["bits_per_byte"]) for one in (first, second)]
    return bootstrap_mean(values[0] - values[1])


def tables(runs: Runs) -> str:
    """Per seed: what each reading came to, and the comparisons, with 95 % intervals."""
    parts = []
    for seed in _seeds(runs):
        lines = []
        for kind, size in _readings(runs, seed):
            found = _read(runs, seed, kind, size)
            bits = bootstrap_mean(found["bits_per_byte"])
            gain = None
            if (kind, size) != (CACHE, 0):
                gain = _interval(difference(runs, seed, (CACHE, 0), (kind, size)))
            row = [kind, size, _interval(bits), found["perplexity"], gain, found["state_bytes"]]
            lines.append([*row, *found["by_position"].values()])
        positions = [f"from {low}" for low in found["by_position"]]
        header = ("model", "entries", "bits per byte", "perplexity per byte")
        header += ("less than with the cache off", "cache bytes per row", *positions)
        parts.append(f"seed {seed}\n\n{report.table(header, lines)}\n\n{comparisons(runs, seed)}")
        zero = runs[f"{CACHE}, seed {seed}"]["zero_gates_give_the_base"]
        parts.append(f"gates at zero give the bits of the model without a cache: {zero}")
    return "\n\n".join(parts)


def comparisons(runs: Runs, seed: int) -> str:
    """Pairs of readings, and in how many documents the second is better."""
    readings = _readings(runs, seed)
    cached = [reading for reading in readings if reading[0] == CACHE]
    pairs = [(cached[0], cached[-1]), *itertools.pairwise(cached[1:])]
    pairs += [((BASE, 0), cached[0]), ((BASE, 0), cached[-1])]
    lines = []
    for first, second in pairs:
        gain = difference(runs, seed, first, second)
        a, b = (np.asarray(_read(runs, seed, *one)["bits_per_byte"]) for one in (first, second))
        verdict = "yes" if gain.excludes(0) else "no"
        better = f"{int((b < a).sum())} of {gain.count}"
        lines.append([_name(first), _name(second), _interval(gain), verdict, better])
    header = ("from", "to", "bits per byte less", "interval excludes 0", "better documents")
    return report.table(header, lines)


def plot(runs: Runs, path: Path) -> None:
    """Perplexity by size of the cache, and bits saved against the model without one by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for seed in _seeds(runs):
        cached = [size for kind, size in _readings(runs, seed) if kind == CACHE]
        found = [bootstrap_mean(_read(runs, seed, CACHE, s)["bits_per_byte"]) for s in cached]
        places = range(len(cached))
        values, lows, highs = np.exp2([(one.value, one.low, one.high) for one in found]).T
        bars = [values - lows, highs - values]
        left.errorbar(places, values, bars, fmt="o-", capsize=3, label=f"{CACHE}, seed {seed}")
        base = bootstrap_mean(_read(runs, seed, BASE, 0)["bits_per_byte"])
        left.axhline(2**base.value, ls="--", color="gray", label=f"{BASE}, seed {seed}")
        window = _read(runs, seed, BASE, 0)["by_position"]
        for size in cached[1:]:
            bits = _read(runs, seed, CACHE, size)["by_position"]
            saved = [window[low] - bits[low] for low in window]
            right.plot(range(len(window)), saved, "o-", label=f"{size} entries, seed {seed}")
    left.set_xticks(list(places), ["off" if size == 0 else str(size) for size in cached])
    left.set(xlabel="entries of the cache", ylabel="perplexity per byte (2^mean bits)")
    right.set_xticks(range(len(window)), [f"from {low}" for low in window])
    right.set(
        xlabel="position in the document (bytes)",
        ylabel="bits per byte less than the model without",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    right.axhline(0, color="black", lw=0.5)
    left.set_title("Held-out documents")
    right.set_title("Against the model without a cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _seeds(runs: Runs) -> list[int]:
    """The seeds of which both models are there."""
    kinds = {
        kind: {r["seed"] for r in runs.values() if r["kind"] == kind} for kind in (BASE, CACHE)
    }
    return sorted(kinds[BASE] & kinds[CACHE])


def _readings(runs: Runs, seed: int) -> list[tuple[str, int]]:
    """The model without a cache first, then the other by the size of its cache."""
    sizes = runs[f"{CACHE}, seed {seed}"]["sizes"]
    return [(BASE, 0), *((CACHE, size) for size in sorted(map(int, sizes)))]


def _read(runs: Runs, seed: int, kind: str, size: int) -> Mapping[str, Any]:
    return runs[f"{kind}, seed {seed}"]["sizes"][str(size)]


def _name(reading: tuple[str, int]) -> str:
    kind, size = reading
    return kind if kind == BASE else f"{size} entries" if size else "cache off"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
