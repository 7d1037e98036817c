"""Llama as transformers has it (Touvron et al. 2023, arXiv 2302.13971), in both directions."""

from typing import Any

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import Architecture, Rule, dropped, renamed, repeated
from memlm.models.interop.our_config import OurConfig, attention, grouped
from memlm.models.interop.their_config import TheirConfig, standardized, written

# Blocks of every model that is built as Llama is.
SITES = {
    "self_attn": "mixer.module",
    "input_layernorm": "mixer.norm",
    "mlp": "ffn.module",
    "post_attention_layernorm": "ffn.norm",
}
NAMES = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
# The frequencies of rotary positions, which older files hold; they follow from the config.
FREQUENCIES = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
HEADS = ("num_heads", "num_key_value_heads", "head_dim", "rope", "rope_theta", "rope_scaling")
BIASES = ("qkv_bias", "output_bias")


def read_decoder(config: TheirConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a `MemLMConfig` but its layers, and the attention that all layers share."""
    config.fixed("hidden_act", "silu", "swish")
    config.fixed("attention_dropout", 0.0, None)
    heads = {
        "num_heads": config.take("num_attention_heads"),
        "num_key_value_heads": config.take("num_key_value_heads"),
        "head_dim": config.take("head_dim"),
        **config.rope(),
    }
    if "rope_fraction" in heads:
        config.refuse("rope_parameters", f"{config.model_type} turns all channels of a head")
    values = config.take_all(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
    )
    config.ignore("num_hidden_layers")
    return values | config.tokens(), heads


def biases(config: TheirConfig) -> dict[str, bool]:
    """The options of attention that `attention_bias` stands for."""
    return dict.fromkeys(BIASES, True) if config.take("attention_bias") else {}


def decoder_rules(config: dict[str, Any], names: tuple[str, ...] = ()) -> list[Rule]:
    """Of a model that is built as Llama is.

    Args:
        config: its config.json.
        names: further tensors of each block.
    """
    values = standardized(config["model_type"], config)
    rules = [renamed(*["model.embed_tokens.weight"] * 2)]
    if values.get("attention_bias"):
        names = (*names, *(f"self_attn.{part}_proj.bias" for part in "qkvo"))
    for layer in range(values["num_hidden_layers"]):
        for name in (*NAMES, *names):
            site, rest = name.split(".", 1)
            theirs = f"model.layers.{layer}.{name}"
            rules.append(renamed(theirs, f"model.layers.{layer}.{SITES[site]}.{rest}"))
    rules.append(renamed(*["model.norm.weight"] * 2))
    if values["tie_word_embeddings"]:
        rules.append(repeated("lm_head.weight", "model.embed_tokens.weight"))
    else:
        rules.append(renamed(*["lm_head.weight"] * 2))
    return [*rules, dropped(*FREQUENCIES)]


def write_decoder(ours: OurConfig, spec: Any, first: int) -> dict[str, Any]:
    """The values of a config.json: the model's, and those of attention `spec` of layer `first`."""
    heads, key_heads, head_dim = spec.heads(ours.config.hidden_size)
    if ours.config.zero_centered_norm:
        ours.refuse("zero_centered_norm", "True")
    return ours.model_values() | {
        "model_type": ours.model_type,
        "rms_norm_eps": ours.config.rms_norm_eps,
        "hidden_act": "silu",
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rope_parameters": ours.rope_parameters(f"layer {first}.mixer", spec),
    }


def write_bias(ours: OurConfig, spec: Any, where: str) -> bool:
    """`attention_bias`: on all four projections or on none."""
    if spec.qkv_bias != spec.output_bias:
        ours.refuse(where, f"qkv_bias {spec.qkv_bias} with output_bias {spec.output_bias}")
    return spec.qkv_bias


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config)
    values, heads = read_decoder(theirs)
    theirs.fixed("mlp_bias", False, None)
    mixer = attention(**heads, **biases(theirs))
    theirs.finish()
    layers = [{"mixer": mixer, "ffn": "swiglu"}] * theirs.take("num_hidden_layers")
    return values | {"layers": grouped(layers)}


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "llama")
    ours.plain_layers("attention")
    mixers = ours.mixers("attention")
    spec = ours.same(mixers)
    ours.only("layer 0.mixer", spec, *HEADS, *BIASES)
    values = write_decoder(ours, spec, 0)
    values["attention_bias"] = write_bias(ours, spec, "layer 0.mixer")
    return written("llama", values | {"architectures": ["LlamaForCausalLM"]})


LLAMA = Architecture("llama", _read_config, decoder_rules, _write_config)
