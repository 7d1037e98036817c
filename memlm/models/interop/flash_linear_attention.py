"""What the models of flash-linear-attention share; their classes are no part of transformers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from memlm.models.interop.architecture import Rule, dropped, parted, renamed, repeated
from memlm.models.interop.our_config import ATTENTION, OurConfig, attention, grouped
from memlm.models.interop.their_config import TheirConfig

DEFAULTS: dict[str, Any] = {
    "attn": None,
    "attn_mode": "chunk",
    "attnres_block_size": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "hidden_act": "swish",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "use_l2warp": False,
    "vocab_size": 32000,
}
# How something is computed, or the loss of training.
_KERNELS = (
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "use_l2warp",
)
_ATTENTION_DEFAULTS = {
    "num_kv_heads": None,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
# A key that no config.json has: whether mlp.gate_proj holds the gate and what it gates, one behind
# the other, as in files from before February 2025.
GATE_HOLDS_BOTH = "gate_proj holds both"
_FIRST = "model.layers.0.mlp"


def read_model(config: TheirConfig, mixer: dict[str, Any]) -> dict[str, Any]:
    """The values of a `MemLMConfig` whose blocks hold `mixer`, but for those of `attn`."""
    config.ignore(*_KERNELS, "hidden_ratio", "num_hidden_layers", GATE_HOLDS_BOTH)
    config.fixed("hidden_act", "swish", "silu")
    config.fixed("attnres_block_size", None)
    values = config.take_all(
        "vocab_size",
        "hidden_size",
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
    )
    values["rms_norm_eps"] = config.take("norm_eps")
    config.take("intermediate_size")
    attending = attention_layers(config)
    config.finish()
    layers = [
        {"mixer": attending.get(index, mixer), "ffn": "swiglu"}
        for index in range(config.values["num_hidden_layers"])
    ]
    return (
        values
        | config.tokens()
        | {"intermediate_size": intermediate_size(config), "layers": grouped(layers)}
    )


def intermediate_size(config: TheirConfig) -> int:
    """Width of the feed-forward layers."""
    given = config.values["intermediate_size"]
    if given is not None:
        return given
    ratio = config.values["hidden_ratio"] or 4
    return 256 * math.ceil(int(config.values["hidden_size"] * ratio * 2 / 3) / 256)


def attention_layers(config: TheirConfig) -> dict[int, dict[str, Any]]:
    """The attention of a hybrid model by the index of its layer.

    Raises:
        UserError: for an option that is not known.
    """
    given = config.take("attn")
    entries = [given] if isinstance(given, Mapping) else given or []
    found = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, Mapping):
            config.refuse("attn", "it must be a mapping, or a list of such")
        unknown = set(entry) - {"layers", "num_heads", *_ATTENTION_DEFAULTS}
        if unknown:
            config.refuse("attn", f"{', '.join(sorted(unknown))} of it is not known here")
        layers, heads = entry.get("layers"), entry.get("num_heads")
        if not isinstance(layers, list) or not isinstance(heads, int) or heads < 1:
            config.refuse("attn", "it needs a list of layers, and num_heads of at least 1")
        beyond = set(layers) - set(range(config.values["num_hidden_layers"]))
        if beyond:
            config.refuse("attn", f"there is no layer {min(beyond, key=str)}")
        options = {**_ATTENTION_DEFAULTS, **entry}
        mixer = attention(
            options["window_size"],
            num_heads=options["num_heads"],
            num_key_value_heads=options["num_kv_heads"] or options["num_heads"],
            head_dim=config.values["hidden_size"] // options["num_heads"],
            rope_theta=float(options["rope_theta"]),
            **({"qkv_bias": True} if options["qkv_bias"] else {}),
        )
        found |= dict.fromkeys(layers, mixer)
    return found


def observe(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json with what only the tensors of older files tell."""
    both = f"{_FIRST}.gate_proj.weight" in tensors and f"{_FIRST}.up_proj.weight" not in tensors
    return {**config, GATE_HOLDS_BOTH: both}


def model_rules(
    config: TheirConfig, mixer: Callable[[str, str], list[Rule]], *drops: str
) -> list[Rule]:
    """Of a whole model.

    Args:
        config: its config.json.
        mixer: rules of a block's mixer, by what its names start with, theirs and ours.
        drops: further tensors that nothing reads.
    """
    width = intermediate_size(config)
    attending = attention_layers(config)
    rules = [renamed("model.embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(config.values["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        theirs, ours = f"{block}.attn", f"{block}.mixer.module"
        rules.append(renamed(f"{block}.attn_norm.weight", f"{block}.mixer.norm.weight"))
        if layer in attending:
            names = [f"{part}_proj.weight" for part in "qkvo"]
            if attending[layer].get("qkv_bias"):
                names += [f"{part}_proj.bias" for part in "qkv"]
            rules += [renamed(f"{theirs}.{name}", f"{ours}.{name}") for name in names]
        else:
            rules += mixer(theirs, ours)
        rules.append(renamed(f"{block}.mlp_norm.weight", f"{block}.ffn.norm.weight"))
        theirs, ours = f"{block}.mlp", f"{block}.ffn.module"
        gate, up, down = (f"{part}_proj.weight" for part in ("gate", "up", "down"))
        names = (f"{ours}.{gate}", f"{ours}.{up}")
        if config.values.get(GATE_HOLDS_BOTH):
            rules.append(parted(f"{theirs}.{gate}", names, [width, width]))
        else:
            rules += [renamed(f"{theirs}.{gate}", names[0]), renamed(f"{theirs}.{up}", names[1])]
        rules.append(renamed(f"{theirs}.{down}", f"{ours}.{down}"))
    rules.append(renamed(*["model.norm.weight"] * 2))
    if config.values["tie_word_embeddings"]:
        rules.append(repeated("lm_head.weight", "model.embeddings.weight"))
    else:
        rules.append(renamed(*["lm_head.weight"] * 2))
    return [*rules, dropped(*drops)] if drops else rules


def write_model(ours: OurConfig, mixer: str) -> tuple[dict[str, Any], Any]:
    """The values of a config.json but for those of `mixer`, and the options of that.

    Raises:
        UserError: for what these models have no place for.
    """
    ours.plain_layers(mixer, *ATTENTION)
    if ours.config.zero_centered_norm:
        ours.refuse("zero_centered_norm", "True")
    own = ours.mixers(mixer)
    if not own:
        ours.refuse("layers", f"a model without {mixer}")
    spec = ours.same(own)
    values = ours.model_values() | {
        "model_type": ours.model_type,
        "norm_eps": ours.config.rms_norm_eps,
        "hidden_act": "swish",
        "attn": _write_attention(ours),
    }
    return values, spec


def _write_attention(ours: OurConfig) -> list[dict[str, Any]] | dict[str, Any] | None:
    entries: list[dict[str, Any]] = []
    held = ("num_heads", "num_key_value_heads", "head_dim", "rope_theta", "qkv_bias", "window")
    for index, spec in ours.mixers(*ATTENTION):
        where = f"layer {index}.mixer"
        ours.only(where, spec, *held)
        heads, key_heads, head_dim = spec.heads(ours.config.hidden_size)
        if heads * head_dim != ours.config.hidden_size:
            ours.refuse(where, f"attention with {heads} heads of {head_dim}")
        entry = {
            "num_heads": heads,
            "num_kv_heads": key_heads,
            "qkv_bias": spec.qkv_bias,
            "window_size": spec.window,
            "rope_theta": spec.rope_theta,
        }
        for known in entries:
            if entry.items() <= known.items():
                known["layers"].append(index)
                break
        else:
            entries.append({"layers": [index], **entry})
    return entries[0] if len(entries) == 1 else entries or None
