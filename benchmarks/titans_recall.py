"""Multi-query associative recall by two layers of neural memory, and what each part is worth.

    python -m benchmarks.titans_recall [--quick]

A model of two layers, whose only mixer is the memory, reads key-value pairs and is asked for every
key once more (memlm.data.mqar; every position behind the pairs holds a question). Each row of the
table takes one part of the memory away, as the ablations of the Titans paper do, or changes its
depth. Runs are stored one by one in benchmarks/results/MACHINE/titans_recall.json with a plot
beside; what is already there is not trained again.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import report
from benchmarks.library import one_thread
from benchmarks.runs import load_runs, save_run
from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data.mqar import IGNORED, MqarRows

SEEDS = (0, 1, 2)
STOP = 0.999  # accuracy that ends a run
EVALUATION_ROWS = 256
EVALUATION_SEED = 1_000_003  # of the held-out rows; training seeds are small


@dataclasses.dataclass(frozen=True)
class Settings:
    """One row of the table.

    Attributes:
        mixer: what the memory has beside BASE.
        pairs: key-value pairs; rows have 4 tokens per pair, the vocabulary too.
        steps: most steps of a run.
        learning_rate: of AdamW, after a linear warm-up constant.
        batch: rows of a step.
        evaluate_every: steps between two evaluations.
    """

    mixer: dict[str, Any]
    pairs: int = 8
    steps: int = 1500
    learning_rate: float = 3e-3
    batch: int = 32
    evaluate_every: int = 50


BASE = {
    "type": "titans",
    "variant": "lmm",
    "depth": 2,
    "num_heads": 2,
    "head_dim": 32,
    "expansion": 2,
    "chunk_size": 16,
    "theta_max": 0.1,
}
ROWS = {
    "depth 2 (full)": Settings({}),
    "depth 1": Settings({"depth": 1}),
    "depth 1, exact": Settings({"depth": 1, "exact": True}),
    # Smaller steps: all layers move at once.
    "depth 3": Settings({"depth": 3, "theta_max": 0.04}),
    "no convolution": Settings({"conv_size": None}),
    "no momentum": Settings({"momentum": False}),
    "no decay": Settings({"decay": False}),
    "depth 1, 16 pairs": Settings({"depth": 1}, pairs=16, steps=2000),
}


def accuracy(model: MemLMForCausalLM, rows: dict[str, np.ndarray]) -> float:
    """Share of the questions whose most likely next token is the value."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(rows["input_ids"]), use_cache=False).logits
    labels = torch.from_numpy(rows["labels"])
    asked = labels != IGNORED
    return float((logits.argmax(-1)[asked] == labels[asked]).double().mean())


def train(settings: Settings, seed: int) -> dict[str, Any]:
    """Train one model.

    Returns:
        {"curve": [[step, held-out accuracy], ...], "accuracy": of the last evaluation, "steps",
        "seconds": processor time of this thread, "error": why training broke off, or None}.
    """
    torch.manual_seed(seed)
    vocabulary, length = 4 * settings.pairs, 4 * settings.pairs
    config = MemLMConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        layers=[{"repeat": 2, "mixer": BASE | settings.mixer, "ffn": "swiglu"}],
    )
    model = MemLMForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    rows = MqarRows(vocabulary, length, settings.pairs, seed, random_filler=False)
    held_out = MqarRows(vocabulary, length, settings.pairs, EVALUATION_SEED, random_filler=False)
    held_out = held_out.batch(np.arange(EVALUATION_ROWS))
    curve, error = [], None
    start = time.process_time()
    for step in range(1, settings.steps + 1):
        batch = rows.batch(np.arange((step - 1) * settings.batch, step * settings.batch))
        logits = model(input_ids=torch.from_numpy(batch["input_ids"]), use_cache=False).logits
        labels = torch.from_numpy(batch["labels"])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            error = f"step {step}: loss {float(loss)}, gradient norm {float(norm)}"
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / 50)
        optimizer.step()
        if step % settings.evaluate_every == 0 or step == settings.steps:
            curve.append([step, accuracy(model, held_out)])
            if curve[-1][1] >= STOP:
                break
    return {
        "curve": curve,
        "accuracy": curve[-1][1] if curve else 0.0,
        "steps": step,
        "seconds": time.process_time() - start,
        "error": error,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and print the table; returns the exit code (1: a run broke off)."""
    parser = argparse.ArgumentParser(prog="benchmarks.titans_recall")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    chosen = {name: ROWS[name] for name in options.rows or ROWS}
    path = options.output / report.machine_name() / "titans_recall.json"
    with one_thread():
        results = run(chosen, SEEDS[:1] if options.quick else SEEDS, path)
    print(f"\n{table(results)}")
    plot(results, path.with_suffix(".png"))
    print(f"\n{path}\n{path.with_suffix('.png')}")
    return 1 if any(result["error"] for result in results.values()) else 0


def run(rows: dict[str, Settings], seeds: Iterable[int], path: Path) -> dict[str, dict[str, Any]]:
    """Train what the file at `path` does not hold with these settings, seed by seed."""
    wanted = [(name, seed) for seed in seeds for name in rows]
    for name, seed in wanted:
        settings = dataclasses.asdict(rows[name])
        if load_runs(path).get(f"{name}, seed {seed}", {}).get("settings") == settings:
            continue
        result = {"row": name, "seed": seed, "settings": settings, **train(rows[name], seed)}
        save_run(result, f"{name}, seed {seed}", path)
        print(
            f"{name}, seed {seed}: accuracy {result['accuracy']:.4f} after {result['steps']} "
            f"steps, {result['seconds']:.0f} s{': ' + result['error'] if result['error'] else ''}",
            flush=True,
        )
    return {key: found for key, found in load_runs(path).items() if found["row"] in rows}


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line per row, its seeds together."""
    lines = []
    for name, found in _by_row(results).items():
        values = [result["accuracy"] for result in found]
        reached = [first_step(result["curve"], 0.99) for result in found]
        lines.append(
            [
                name,
                found[0]["settings"]["pairs"],
                len(found),
                f"{statistics.mean(values):.3f}",
                f"{min(values):.3f} to {max(values):.3f}",
                ", ".join("-" if step is None else str(step) for step in reached),
                f"{statistics.mean(result['seconds'] for result in found):.0f}",
            ]
        )
    header = ("row", "pairs", "seeds", "accuracy", "range", "steps to 0.99", "CPU s")
    return report.table(header, lines)


def first_step(curve: list[list[float]], level: float) -> int | None:
    """The step at which a curve of [step, accuracy] first is at `level` or above."""
    return next((step for step, value in curve if value >= level), None)


def _by_row(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results in the order of ROWS, and of seeds."""
    found = {
        name: sorted((r for r in results.values() if r["row"] == name), key=lambda r: r["seed"])
        for name in ROWS
    }
    return {name: rows for name, rows in found.items() if rows}


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy over the steps, a line per row: the seeds' mean within their range."""
    from matplotlib.figure import Figure

    by_row = _by_row(results)
    sizes = sorted({found[0]["settings"]["pairs"] for found in by_row.values()})
    figure = Figure(figsize=(6.5 * len(sizes), 4.5), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for index, (name, found) in enumerate(by_row.items()):
            if found[0]["settings"]["pairs"] != pairs:
                continue
            steps = sorted({step for result in found for step, _ in result["curve"]})
            # A run that stopped early keeps the accuracy it stopped with.
            curves = [np.interp(steps, *zip(*result["curve"], strict=True)) for result in found]
            colour = f"C{index}"
            axes.plot(steps, np.mean(curves, axis=0), color=colour, label=name)
            axes.fill_between(
                steps, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.15
            )
        axes.set(title=f"{pairs} pairs", xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Multi-query associative recall, two layers of neural memory")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
