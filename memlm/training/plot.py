"""The picture of a run."""

from pathlib import Path
from typing import Any

_COLOURS = {"text": "tab:blue", "answer": "tab:red"}


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
    figure.suptitle(title)
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
    figure.savefig(path, dpi=110)


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
