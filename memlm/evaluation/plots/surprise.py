"""The surprise of memories over a text."""

from typing import Any

from memlm.evaluation.plots.style import new_figure, png, styled


def draw_surprise(surprise: dict[str, Any], window: int = 32, dark: bool = False) -> bytes:
    """PNG of the surprise of each memory by position, the mean over rows and heads.

    Args:
        surprise: tensors [B, T, H] by name, as `memlm.memory.records.record_surprise` gives them.
        window: tokens of the running mean.
        dark: for dark backgrounds.
    """
    with styled(dark):
        figure, (axis,) = new_figure(7.0, 3.9)
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
        return png(figure)
