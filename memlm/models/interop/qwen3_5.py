"""Qwen3.5 as transformers has it, dense and with experts: the text models in both directions, and
the language models of those that see."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import Architecture, Rule, dropped, parted, renamed
from memlm.models.interop.delta_hybrids import (
    check_layers,
    fixed_where_given,
    outer_rules,
    read_model,
    swiglu_rules,
    swiglu_width,
)
from memlm.models.interop.our_config import OurConfig, grouped
from memlm.models.interop.qwen3_next import (
    FURTHER_TOKENS,
    expert_rules,
    layer_rules,
    observe,
    read_experts,
    read_mixers,
    write_experts,
    write_mixers,
)
from memlm.models.interop.their_config import TheirConfig, standardized

TEXT = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
VISION = "model.visual.*"
# Of the positions of pictures; the three numbers of a position are the same in a text.
_PICTURE_POSITIONS = ("mrope_section", "mrope_interleaved")
_PICTURE_OPTIONS = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def _read_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of a text model."""
    theirs = TheirConfig(config)
    values = read_model(theirs)
    mixers = read_mixers(theirs)
    for mixer in mixers:
        for name in _PICTURE_POSITIONS:
            mixer.get("rope_scaling", {}).pop(name, None)
    # The gates behind attention and (by their function) behind Gated DeltaNet.
    fixed_where_given(theirs, attn_output_gate=True, output_gate_type="swish", mlp_only_layers=[])
    if theirs.model_type == "qwen3_5_moe_text":
        ffn: Any = read_experts(theirs, normalize_weights=True)
    else:
        ffn = "swiglu"
        values |= theirs.take_all("intermediate_size")
    theirs.finish()
    layers = [{"mixer": mixer, "ffn": ffn} for mixer in mixers]
    return values | {"zero_centered_norm": True, "layers": grouped(layers)}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of a model that sees: its language model."""
    theirs = TheirConfig(config)
    theirs.ignore("text_config", *_PICTURE_OPTIONS)
    tied = theirs.take("tie_word_embeddings")
    theirs.finish()
    return _read_text_config(_text_values(config)) | {"tie_word_embeddings": tied}


def _observe_experts(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As `qwen3_next.observe`, of a model that sees."""
    return {**config, "text_config": observe(config.get("text_config") or {}, tensors)}


def _text_values(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the language model of a model that sees."""
    return {**(config.get("text_config") or {}), "model_type": TEXT[config["model_type"]]}


def _text_rules(config: dict[str, Any], prefix: str = "model") -> list[Rule]:
    """Of a text model, or of the language model of one that sees.

    Args:
        config: the config.json of the text model.
        prefix: of its names in the checkpoint.
    """
    values = standardized(config["model_type"], config)
    keys = values["linear_num_key_heads"] * values["linear_key_head_dim"]
    sizes = (keys, keys, values["linear_num_value_heads"] * values["linear_value_head_dim"])
    found = [*outer_rules(values, prefix), dropped(FURTHER_TOKENS)]
    for layer, kind in enumerate(values["layer_types"]):
        found += layer_rules(values, layer, prefix)
        theirs, ours = f"{prefix}.layers.{layer}", f"model.layers.{layer}"
        if kind == "linear_attention":
            of, to = f"{theirs}.linear_attn.in_proj", f"{ours}.mixer.module"
            qkv = [f"{to}.{name}_proj.weight" for name in "qkv"]
            found.append(parted(f"{of}_qkv.weight", qkv, sizes))
            for name, our_name in (("z", "g"), ("b", "b"), ("a", "a")):
                found.append(renamed(f"{of}_{name}.weight", f"{to}.{our_name}_proj.weight"))
        theirs, ours = f"{theirs}.mlp", f"{ours}.ffn.module"
        if values["model_type"] == "qwen3_5_moe_text":
            found += expert_rules(values, theirs, ours)
        else:
            found += swiglu_rules(theirs, ours)
    return found


def _rules(config: dict[str, Any]) -> list[Rule]:
    """Of a model that sees."""
    tied = standardized(config["model_type"], config)["tie_word_embeddings"]
    values = _text_values(config) | {"tie_word_embeddings": tied}
    return [*_text_rules(values, "model.language_model"), dropped(VISION)]


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    """Of a dense text model."""
    ours = OurConfig(config, "qwen3_5_text")
    check_layers(ours, {"attention": "pre", "gated_delta": "pre"}, ("swiglu",))
    values = write_mixers(ours) | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "intermediate_size": swiglu_width(ours),
    }
    return standardized(ours.model_type, values)


def _write_moe_config(config: MemLMConfig) -> dict[str, Any]:
    """Of a text model with experts."""
    ours = OurConfig(config, "qwen3_5_moe_text")
    check_layers(ours, {"attention": "pre", "gated_delta": "pre"}, ("moe",))
    values = write_mixers(ours) | write_experts(ours)
    if not values.pop("norm_topk_prob"):
        ours.refuse("layer 0.ffn", "normalize_weights False")
    del values["intermediate_size"]
    return standardized(ours.model_type, values | {"architectures": ["Qwen3_5MoeForCausalLM"]})


QWEN3_5 = Architecture("qwen3_5", _read_config, _rules)
QWEN3_5_MOE = Architecture("qwen3_5_moe", _read_config, _rules, observe=_observe_experts)
QWEN3_5_TEXT = Architecture("qwen3_5_text", _read_text_config, _text_rules, _write_config)
QWEN3_5_MOE_TEXT = Architecture(
    "qwen3_5_moe_text", _read_text_config, _text_rules, _write_moe_config, observe
)
