"""The pictures that a run leaves in its own folder."""

import io
from pathlib import Path
from typing import Any

from memlm.files import replace_file
from memlm.training.logs import METRICS_FILE, PLOT_FILE, read_metrics
from memlm.training.usage import USAGE_PLOT_FILE, UsageLog

_COLOURS = {"text": "tab:blue", "answer": "tab:red"}


def plot_run(folder: Path, usage: UsageLog) -> None:
    """Draw what a run folder's metrics say into it: training.png, and usage.png of its tables."""
    records, title = read_metrics(folder / METRICS_FILE), f"Training of {folder}"
    plot_metrics(records, folder / PLOT_FILE, title)
    if usage.recorders:
        plot_usage(records, folder / USAGE_PLOT_FILE, title, usage.curves)


def plot_metrics(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, learning rate, gradient norm and speed over the steps as a PNG.

    Args:
        records: records of metrics.jsonl: of steps, and of evaluations (with `evaluation`).
        path: the file to write.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    steps = [record for record in records if not record.get("evaluation")]
    evaluations = [record for record in records if record.get("evaluation")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, rate, norm, speed = figure.subplots(2, 2, sharex=True).flat

    for group in ("text", "answer"):
        points = [(r["step"], r[f"{group}_bits"]) for r in steps if f"{group}_bits" in r]
        if points:
            loss.plot(*zip(*points, strict=True), color=_COLOURS[group], label=f"training, {group}")
        points = [(r["step"], r[f"{group}_bits"]) for r in evaluations if f"{group}_bits" in r]
        if points:
            loss.plot(
                *zip(*points, strict=True),
                "o",
                color=_COLOURS[group],
                markeredgecolor="black",
                label=f"held-out, {group}",
            )
    loss.set(title="Loss", ylabel="bits per token", ylim=(0, None))
    if loss.lines:
        loss.legend()

    _line(rate, steps, "learning_rate", "tab:green")
    rate.set(title="Learning rate (AdamW)", ylabel="learning rate", ylim=(0, None))
    _line(norm, steps, "grad_norm", "tab:purple")
    norm.set(title="Gradient norm before clipping", ylabel="norm", yscale="log")
    _line(speed, steps, "tokens_per_second", "tab:orange")
    speed.set(title="Speed", ylabel="tokens per second", ylim=(0, None))

    for axes in (loss, rate, norm, speed):
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
        _mark_stages(axes, steps, named=axes is rate)
    _save(figure, path, title)


def plot_usage(
    records: list[dict[str, Any]],
    path: Path,
    title: str,
    curves: dict[str, tuple[list[int], list[float]]],
) -> None:
    """Draw how evenly the slots of product-key memories were read as a PNG.

    Args:
        records: records of metrics.jsonl, with SITE.used, SITE.kl_to_uniform and SITE.top1_mass.
        path: the file to write.
        title: above the picture.
        curves: by site: ranks of slots and their reads as multiples of the mean.
    """
    from matplotlib.figure import Figure

    steps = [record for record in records if not record.get("evaluation")]
    evaluations = [record for record in records if record.get("evaluation")]
    keys = dict.fromkeys(key for record in records for key in record)
    sites = [key.removesuffix(".used") for key in keys if key.endswith(".used")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    used, kl, top, rank = figure.subplots(2, 2).flat
    for axes, statistic, scale in (
        (used, "used", 100),
        (kl, "kl_to_uniform", 1),
        (top, "top1_mass", 100),
    ):
        for number, site in enumerate(sites):
            for found, style in ((steps, ".-"), (evaluations, "o")):
                key = f"{site}.{statistic}"
                points = [(r["step"], scale * r[key]) for r in found if key in r]
                label = site if style == ".-" else "held-out rows" if number == 0 else None
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{number}",
                        markeredgecolor="black" if style == "o" else None,
                        label=label,
                    )
    used.set(title="Slots that were read", ylabel="% of the slots", ylim=(0, 105))
    kl.set(title="Divergence of the reads from uniform", ylabel="KL in nats", ylim=(0, None))
    top.set(title="Reads of the most read 1 % of the slots", ylabel="% of the reads")
    top.set(ylim=(0, None))
    for axes in (used, kl, top):
        axes.set_xlabel("step")
        _mark_stages(axes, steps, named=False)
    for number, site in enumerate(sites):
        if site in curves:
            rank.plot(*curves[site], color=f"C{number}", label=site)
    rank.axhline(1, color="grey", linewidth=0.8, linestyle=":", label="uniform")
    rank.set(title="Reads by rank, last window of training", xscale="log")
    rank.set(xlabel="rank of the slot", ylabel="reads / mean reads per slot")
    rank.set_yscale("symlog", linthresh=0.01)
    rank.set_ylim(0, None)
    for axes in (used, rank):
        axes.legend(fontsize=8)
    for axes in (used, kl, top, rank):
        axes.grid(alpha=0.3)
    _save(figure, path, title)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, parse_math=False)  # the folder of a run may have any name
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())


def _line(axes, steps: list[dict[str, Any]], key: str, colour: str) -> None:
    axes.plot([r["step"] for r in steps], [r[key] for r in steps], color=colour)


def _mark_stages(axes, steps: list[dict[str, Any]], named: bool) -> None:
    """A grey line where a stage of the curriculum begins, with its row length if `named`."""
    for before, after in zip([None, *steps], steps, strict=False):
        if before is None or before["stage"] == after["stage"]:
            continue
        axes.axvline(after["step"], color="grey", linewidth=0.8, linestyle=":")
        if named:
            axes.annotate(
                f"length {after['length']}",
                (after["step"], 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=8,
                color="dimgrey",
                ha="right",
            )
