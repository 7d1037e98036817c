"""RetNet of flash-linear-attention (Sun et al. 2023, arXiv 2307.08621), in both directions."""

from typing import Any

from memlm.models.configuration import MemLMConfig
from memlm.models.interop import flash_linear_attention as fla
from memlm.models.interop.architecture import Architecture, Rule, renamed
from memlm.models.interop.our_config import OurConfig
from memlm.models.interop.their_config import TheirConfig

DEFAULTS = fla.DEFAULTS | {
    "elementwise_affine": True,
    "expand_k": 1.0,
    "expand_v": 2.0,
    "feature_map": None,
    "hidden_ratio": 2,
    "num_heads": 8,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "use_output_gate": True,
    "use_short_conv": False,
}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config, DEFAULTS)
    heads, width = theirs.take("num_heads"), theirs.values["hidden_size"]
    theirs.fixed("num_kv_heads", None, heads)
    theirs.fixed("feature_map", None)
    theirs.fixed("use_short_conv", False)
    theirs.fixed("use_output_gate", True)
    theirs.fixed("elementwise_affine", True)
    theirs.ignore("conv_size")  # of the short convolution
    if heads < 1:
        theirs.refuse("num_heads", "it must be at least 1")
    key, value = (round(width * theirs.take(f"expand_{part}")) for part in "kv")
    for name, channels in (("expand_k", key), ("expand_v", value)):
        if channels < 1 or channels % heads:
            theirs.refuse(name, f"{channels} channels cannot be those of {heads} heads")
    mixer = {
        "type": "retention",
        "num_heads": heads,
        "head_dim": key // heads,
        "expand_v": value / key,
    }
    return fla.read_model(theirs, mixer)


def _rules(config: dict[str, Any]) -> list[Rule]:
    theirs = TheirConfig(config, DEFAULTS)
    norm = "g_norm_swish_gate.weight" if theirs.values["fuse_norm"] else "g_norm.weight"

    def mixer(theirs: str, ours: str) -> list[Rule]:
        names = [f"{part}_proj.weight" for part in "qkvgo"]
        return [
            *(renamed(f"{theirs}.{name}", f"{ours}.{name}") for name in names),
            renamed(f"{theirs}.{norm}", f"{ours}.o_norm.weight"),
        ]

    return fla.model_rules(theirs, mixer)


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "retnet")
    values, spec = fla.write_model(ours, "retention")
    where = f"layer {ours.mixers('retention')[0][0]}.mixer"
    ours.only(where, spec, "num_heads", "head_dim", "expand_v")
    heads, key, value = spec.sizes(config.hidden_size)
    return values | {
        "architectures": ["RetNetForCausalLM"],
        "num_heads": heads,
        "expand_k": heads * key / config.hidden_size,
        "expand_v": heads * value / config.hidden_size,
    }


RETNET = Architecture("retnet", _read_config, _rules, _write_config, fla.observe)
