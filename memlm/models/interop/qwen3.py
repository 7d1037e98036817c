"""Qwen3 without experts as transformers has it (Yang et al. 2025, arXiv 2505.09388), in both
directions."""

from typing import Any

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import Architecture, Rule
from memlm.models.interop.llama import (
    BIASES,
    HEADS,
    biases,
    decoder_rules,
    read_decoder,
    write_bias,
    write_decoder,
)
from memlm.models.interop.our_config import ATTENTION, OurConfig, attention, grouped
from memlm.models.interop.their_config import TheirConfig, written

NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config)
    values, heads = read_decoder(theirs)
    heads |= biases(theirs) | {"qk_norm": True}
    windows = {"full_attention": None, "sliding_attention": theirs.take("sliding_window")}
    theirs.ignore("use_sliding_window", "max_window_layers")  # what layer_types is made from
    layers = []
    for kind in theirs.take("layer_types"):
        if kind not in windows:
            theirs.refuse("layer_types", f"layers are {' or '.join(windows)} here")
        layers.append({"mixer": attention(windows[kind], **heads), "ffn": "swiglu"})
    theirs.finish()
    return values | {"layers": grouped(layers)}


def _rules(config: dict[str, Any]) -> list[Rule]:
    return decoder_rules(config, NORMS)


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "qwen3")
    ours.plain_layers(*ATTENTION)
    mixers = ours.mixers(*ATTENTION)
    spec = ours.same(mixers, "window")
    if spec.qk_norm is not True:
        ours.refuse("layer 0.mixer", f"qk_norm {spec.qk_norm!r}")
    ours.only("layer 0.mixer", spec, *HEADS, *BIASES, "window", "qk_norm")
    windows = {mixer.window for _, mixer in mixers} - {None}
    if len(windows) > 1:
        ours.refuse("layers", f"a window of {max(windows)} beside one of {min(windows)}")
    values = write_decoder(ours, spec, 0) | {
        "attention_bias": write_bias(ours, spec, "layer 0.mixer"),
        "use_sliding_window": bool(windows),
        "sliding_window": next(iter(windows), None),
        "layer_types": [
            "full_attention" if mixer.window is None else "sliding_attention" for _, mixer in mixers
        ],
    }
    return written("qwen3", values | {"architectures": ["Qwen3ForCausalLM"]})


QWEN3 = Architecture("qwen3", _read_config, _rules, _write_config)
