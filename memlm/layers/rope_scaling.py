"""Rotary frequencies that are stretched, so that a model reads further than it was trained to.

Linear (Chen et al., arXiv 2306.15595), YaRN (Peng et al., arXiv 2309.00071) and that of Llama 3.1
(arXiv 2407.21783), computed by transformers.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memlm.errors import UserError, nearest, require_known

# Keys of each kind of scaling: those it must have, and those it may have.
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_BY_LENGTH = ("dynamic", "longrope")


def check_rope_scaling(scaling: dict[str, Any], theta: float) -> None:
    """Raise UserError for a `rope_scaling` that cannot work (see `AttentionConfig`)."""
    kind = scaling.get("rope_type")
    kind = kind if kind is None else str(kind)
    if kind in _BY_LENGTH:
        raise UserError(
            f"rope_scaling: the frequencies of {kind} depend on the length of the call, so a text "
            f"read in parts would differ; use {', '.join(_SCALINGS)}"
        )
    if kind not in _SCALINGS:
        what = "rope_type is missing" if kind is None else f"rope_type {kind!r} is unknown"
        raise UserError(
            f"rope_scaling: {what}{nearest(kind, _SCALINGS)} (valid: {', '.join(_SCALINGS)})"
        )
    required, optional = _SCALINGS[kind]
    require_known(scaling, ("rope_type", *required, *optional), f"rope_scaling of {kind}")
    missing = [key for key in required if scaling.get(key) is None]
    if missing:
        raise UserError(f"rope_scaling: {kind} needs {', '.join(missing)}")
    for key, value in scaling.items():
        if key == "rope_type" or (value is None and key in optional):
            continue
        if key == "truncate":
            if not isinstance(value, bool):
                raise UserError(f"rope_scaling: truncate must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**63:
            raise UserError(f"rope_scaling: {key} must be a positive number, got {value!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError("rope_scaling: high_freq_factor must be more than low_freq_factor")
    if kind == "yarn":
        if theta <= 1:
            raise UserError(f"rope_scaling: yarn needs a rope_theta above 1, got {theta}")
        if (scaling.get("beta_fast") or 32) < (scaling.get("beta_slow") or 1):
            raise UserError("rope_scaling: beta_fast must be at least beta_slow")


@torch.compiler.assume_constant_result
def scaled_frequencies(
    channels: int, theta: float, scaling: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[Tensor, float]:
    """Frequencies as transformers makes them, once; torch.compile takes them for constants.

    Args:
        channels: turned ones.
        theta: base of the frequencies before they are stretched.
        scaling: the items of a checked `rope_scaling` that is not `default`.
        device: of the result.

    Returns:
        float64 [channels / 2], radians per position, and the factor on cosine and sine.
    """
    return _scaled_frequencies(channels, theta, scaling, device)


@functools.lru_cache(maxsize=64)
def _scaled_frequencies(
    channels: int, theta: float, scaling: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[Tensor, float]:
    parameters = {**dict(scaling), "rope_theta": theta}
    config = types.SimpleNamespace(
        rope_parameters=parameters,
        head_dim=channels,
        hidden_size=channels,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,  # they are
    )
    # Kept for later calls, so not made on the meta device even if the first one is.
    with torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
        return frequencies.double().to(device), factor
