"""OLMo Hybrid as transformers has it, in both directions.

Norms stand behind the sites of layers of attention, and before those of Gated DeltaNet.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import Architecture, Rule, joined, renamed
from memlm.models.interop.delta_hybrids import (
    BIASES,
    KINDS,
    check_layers,
    fixed_where_given,
    outer_rules,
    read_delta,
    read_kinds,
    read_model,
    same_names,
    swiglu_rules,
    swiglu_width,
    write_attention,
    write_delta,
)
from memlm.models.interop.our_config import OurConfig, grouped
from memlm.models.interop.their_config import TheirConfig, standardized

NORMS = {"attention": "post", "gated_delta": "pre"}
OUTPUT_NORM_EPS = 1e-5  # of Gated DeltaNet, whatever the config says of the other norms
_START_VALUES = ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")
# Names of norms: of Gated DeltaNet and what follows, and of attention and what follows.
_DELTA_NORMS = ("attention_layer_norm", "feedforward_layer_norm")
_ATTENTION_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
# What `observe` adds to a config.json: see there.
_RENAMED, _CUT = "attention_norms_renamed", "convolution_cut"


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config)
    values = read_model(theirs) | theirs.take_all("intermediate_size")
    heads = {
        "type": "attention",
        "num_heads": theirs.take("num_attention_heads"),
        "num_key_value_heads": theirs.take("num_key_value_heads"),
        "qk_norm": "all_heads",
        **_read_rope(theirs),
    }
    if theirs.take("attention_bias"):
        heads |= dict.fromkeys(BIASES, True)
    delta = read_delta(
        theirs,
        norm_eps=OUTPUT_NORM_EPS,
        allow_neg_eigval=theirs.take("linear_allow_neg_eigval"),
    )
    mixers = {"attention": heads, "gated_delta": delta}
    kinds = read_kinds(theirs)
    fixed_where_given(theirs, linear_use_gate=True)
    theirs.ignore("fla_hybrid_attention_indices", "sliding_window")  # layer_types says as much
    theirs.ignore(_RENAMED, _CUT, *(f"linear_{name}" for name in _START_VALUES))
    theirs.finish()
    layers = [{"mixer": mixers[kind], "ffn": "swiglu", "norm": NORMS[kind]} for kind in kinds]
    return values | {"layers": grouped(layers)}


def _read_rope(theirs: TheirConfig) -> dict[str, Any]:
    """Rotary positions; none where rope_theta is null."""
    if theirs.values["rope_parameters"].get("rope_theta") is None:
        theirs.ignore("rope_parameters", "rope_scaling", "rope_theta")
        return {"rope": False}
    rope = theirs.rope()
    if "rope_fraction" in rope:
        theirs.refuse("rope_parameters", "olmo_hybrid turns all channels of a head")
    return rope


def _observe(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json with two things that transformers writes otherwise than they are published.

    The norm behind attention has the name of another one, and the convolution is not cut into
    that of queries, keys and values, but into equal parts.
    """
    kinds = standardized(config["model_type"], config)["layer_types"]
    found = dict(config)
    for layer, kind in enumerate(kinds):
        root = f"model.layers.{layer}"
        if kind == "full_attention":
            found.setdefault(_RENAMED, f"{root}.{_DELTA_NORMS[1]}.weight" in tensors)
        else:
            parts = [tensors.get(f"{root}.linear_attn.{name}_conv1d.weight") for name in "qkv"]
            found.setdefault(_CUT, [0 if part is None else len(part) for part in parts])
    return found


def _rules(config: dict[str, Any]) -> list[Rule]:
    values = standardized(config["model_type"], config)
    found = outer_rules(values)
    for layer, kind in enumerate(values["layer_types"]):
        theirs, ours = f"model.layers.{layer}", f"model.layers.{layer}"
        if kind == "full_attention":
            found += _attention_rules(values, theirs, ours)
        else:
            found += _delta_rules(values, theirs, ours)
        found += swiglu_rules(f"{theirs}.mlp", f"{ours}.ffn.module")
    return found


def _attention_rules(values: Mapping[str, Any], theirs: str, ours: str) -> list[Rule]:
    kinds = ("weight", "bias") if values["attention_bias"] else ("weight",)
    names = [f"{part}_proj.{kind}" for kind in kinds for part in "qkvo"]
    first, second = _ATTENTION_NORMS
    if values.get(_RENAMED):
        first = _DELTA_NORMS[1]
    return [
        *same_names(
            f"{theirs}.self_attn",
            f"{ours}.mixer.module",
            [*names, "q_norm.weight", "k_norm.weight"],
        ),
        renamed(f"{theirs}.{first}.weight", f"{ours}.mixer.post_norm.weight"),
        renamed(f"{theirs}.{second}.weight", f"{ours}.ffn.post_norm.weight"),
    ]


def _delta_rules(values: Mapping[str, Any], theirs: str, ours: str) -> list[Rule]:
    first, second = _DELTA_NORMS
    module, linear = f"{ours}.mixer.module", f"{theirs}.linear_attn"
    keys = values["linear_num_key_heads"] * values["linear_key_head_dim"]
    channels = (keys, keys, values["linear_num_value_heads"] * values["linear_value_head_dim"])
    cut = values.get(_CUT, channels)
    if sum(cut) != sum(channels):  # then the shapes are wrong, and are expected to be right
        cut = channels
    names = [f"{name}_proj.weight" for name in "qkvabgo"]
    convolutions = [f"{linear}.{name}_conv1d.weight" for name in "qkv"]
    return [
        *same_names(linear, module, [*names, "o_norm.weight", "A_log", "dt_bias"]),
        joined(convolutions, f"{module}.conv1d.weight", cut),
        renamed(f"{theirs}.{first}.weight", f"{ours}.mixer.norm.weight"),
        renamed(f"{theirs}.{second}.weight", f"{ours}.ffn.norm.weight"),
    ]


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "olmo_hybrid")
    check_layers(ours, NORMS, ("swiglu",))
    if config.zero_centered_norm:
        ours.refuse("zero_centered_norm", "True")
    delta_layers = ours.mixers("gated_delta")
    if not delta_layers:
        ours.refuse("layers", "a model without Gated DeltaNet")
    held = ("rope", "rope_theta", "rope_scaling")
    attention, spec = write_attention(ours, *held, qk_norm="all_heads")
    where = f"layer {ours.mixers('attention')[0][0]}.mixer"
    heads, _, head_dim = spec.heads(config.hidden_size)
    if heads * head_dim != config.hidden_size:
        ours.refuse(where, f"head_dim {head_dim} of {heads} heads")
    negative = delta_layers[0][1].allow_neg_eigval
    if spec.rope:
        rope = ours.rope_parameters(where, spec)
    else:
        rope = {"rope_type": "default", "rope_theta": None}
    values = {
        **ours.model_values(),
        **attention,
        **write_delta(ours, norm_eps=OUTPUT_NORM_EPS, allow_neg_eigval=negative),
        "model_type": ours.model_type,
        "architectures": ["OlmoHybridForCausalLM"],
        "linear_allow_neg_eigval": negative,
        "intermediate_size": swiglu_width(ours),
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "layer_types": [KINDS[plan.mixer[0]] for plan in ours.plans],
    }
    return standardized(ours.model_type, values)


OLMO_HYBRID = Architecture("olmo_hybrid", _read_config, _rules, _write_config, _observe)
