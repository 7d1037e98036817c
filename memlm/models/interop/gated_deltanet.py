"""Gated DeltaNet of flash-linear-attention (Yang et al. 2024, arXiv 2412.06464), in both
directions: also hybrid models, and files from before March 2025."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlm.models.configuration import MemLMConfig
from memlm.models.interop import flash_linear_attention as fla
from memlm.models.interop.architecture import Architecture, Rule, joined, renamed
from memlm.models.interop.our_config import OurConfig
from memlm.models.interop.their_config import TheirConfig

DEFAULTS = fla.DEFAULTS | {
    "allow_neg_eigval": False,
    "conv_bias": False,
    "conv_size": 4,
    "expand_v": 2.0,
    "head_dim": 256,
    "hidden_ratio": 4,
    "num_heads": 6,
    "num_hidden_layers": 21,
    "num_v_heads": None,
    "output_gate_activation": "swish",
    "use_gate": True,
    "use_short_conv": True,
}
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
_UNREAD = "model.layers.*.attn.D"  # of files from before March 2025


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config, DEFAULTS)
    activation = theirs.take("output_gate_activation")
    theirs.fixed("output_gate_activation", *_ACTIVATIONS)
    convolves, conv_size = theirs.take("use_short_conv"), theirs.take("conv_size")
    mixer = {
        "type": "gated_delta",
        "num_heads": theirs.take("num_heads"),
        "num_v_heads": theirs.take("num_v_heads") or theirs.take("num_heads"),
        "head_dim": theirs.take("head_dim"),
        "expand_v": float(theirs.take("expand_v")),
        "conv_size": conv_size if convolves else None,
        "use_gate": theirs.take("use_gate"),
        "allow_neg_eigval": theirs.take("allow_neg_eigval"),
    }
    if theirs.take("conv_bias") and convolves:
        mixer["conv_bias"] = True
    if mixer["use_gate"] and _ACTIVATIONS[activation] != "silu":
        mixer["gate_activation"] = _ACTIVATIONS[activation]
    return fla.read_model(theirs, mixer)


def _rules(config: dict[str, Any]) -> list[Rule]:
    theirs = TheirConfig(config, DEFAULTS)
    values = theirs.values
    heads, key = values["num_heads"], values["head_dim"]
    value_width = (values["num_v_heads"] or heads) * int(key * values["expand_v"])
    widths = [heads * key, heads * key, value_width]

    def mixer(theirs: str, ours: str) -> list[Rule]:
        names = [f"{part}_proj.weight" for part in "qkvabo"]
        names += ["A_log", "dt_bias", "o_norm.weight"]
        if values["use_gate"]:
            names.append("g_proj.weight")
        found = [renamed(f"{theirs}.{name}", f"{ours}.{name}") for name in names]
        if values["use_short_conv"]:
            for kind in ("weight", *(["bias"] if values["conv_bias"] else [])):
                convolutions = [f"{theirs}.{part}_conv1d.{kind}" for part in "qkv"]
                found.append(joined(convolutions, f"{ours}.conv1d.{kind}", widths))
        return found

    return fla.model_rules(theirs, mixer, _UNREAD)


def _observe(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json with what only the tensors tell: models are built without conv_bias."""
    biased = any(name.endswith(".q_conv1d.bias") for name in tensors)
    return fla.observe({**config, "conv_bias": biased}, tensors)


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "gated_deltanet")
    values, spec = fla.write_model(ours, "gated_delta")
    where = f"layer {ours.mixers('gated_delta')[0][0]}.mixer"
    if not spec.decay:
        ours.refuse(where, "decay False")
    if spec.beta_bias is not None:
        ours.refuse(where, f"beta_bias {spec.beta_bias}")
    if spec.conv_bias:
        ours.refuse(where, "conv_bias True")
    if spec.norm_eps not in (None, config.rms_norm_eps):
        ours.refuse(where, f"norm_eps {spec.norm_eps} beside rms_norm_eps {config.rms_norm_eps}")
    heads, value_heads, key, value = spec.sizes(config.hidden_size)
    return values | {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "num_heads": heads,
        "num_v_heads": value_heads,
        "head_dim": key,
        "expand_v": value / key,
        "use_short_conv": spec.conv_size is not None,
        "conv_size": spec.conv_size or DEFAULTS["conv_size"],
        "use_gate": spec.use_gate,
        "allow_neg_eigval": spec.allow_neg_eigval,
        "output_gate_activation": "swish" if spec.gate_activation == "silu" else "sigmoid",
    }


GATED_DELTANET = Architecture("gated_deltanet", _read_config, _rules, _write_config, _observe)
