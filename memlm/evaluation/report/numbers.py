"""Numbers as people read them."""

from typing import Any

from memlm.evaluation.lengths import format_length

MISSING = "–"


def value_text(value: float | None, kind: str, signed: bool = False) -> str:
    """A share as a percentage with one decimal, a loss with three; "?" for an unknown bound."""
    if value is None:
        return "?"
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" if kind == "losses" else f"{100 * value:{sign}.1f}"


def estimate_text(
    estimate: dict[str, Any] | None, kind: str, signed: bool = False
) -> tuple[str, str]:
    """Value and interval, as in ("97.9", "[92.7, 99.4]"); a dash where nothing was measured."""
    if estimate is None:
        return MISSING, ""
    value, low, high = (value_text(estimate[key], kind, signed) for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"


def bytes_text(count: int | None) -> str:
    """512 B, 13.5 KiB, 1.2 GiB."""
    if count is None:
        return MISSING
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """0.4 s, 75 s, 12 min, 3 h 20 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def rate_text(rate: float | None) -> str:
    """Tokens per second: 0.52, 8.3, 12,300."""
    if rate is None:
        return MISSING
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def setting_text(label: str, axis: str) -> str:
    """The label of a setting; lengths in tokens as 4k or 1M."""
    if label.isdecimal() and "tokens" in axis:
        return format_length(int(label))
    return label


def count_text(number: int, noun: str) -> str:
    """1 task, 2 tasks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def unit_of(axis: str) -> str:
    """ "tokens" of "length (tokens)", "pairs" of "key-value pairs"."""
    return axis.split("(")[1].rstrip(")") if "(" in axis else axis.rsplit(" ", 1)[-1]


def metric_name(metric: str) -> str:
    """ "recall" of "recall (%)"."""
    return metric.removesuffix(" (%)")
