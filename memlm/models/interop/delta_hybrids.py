"""What maps share of architectures that mix attention with layers of Gated DeltaNet."""

from collections.abc import Iterable, Mapping
from typing import Any

from memlm.models.interop.architecture import Rule, renamed, repeated
from memlm.models.interop.our_config import OurConfig
from memlm.models.interop.their_config import TheirConfig

MIXERS = {"full_attention": "attention", "linear_attention": "gated_delta"}
KINDS = {ours: theirs for theirs, ours in MIXERS.items()}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BIASES = ("qkv_bias", "output_bias")
_DELTA = ("num_heads", "num_v_heads", "head_dim", "expand_v", "conv_size")
_START_VALUES = ("dt_min", "dt_max", "A_min", "A_max")


def read_model(theirs: TheirConfig) -> dict[str, Any]:
    """The values of a `MemLMConfig` but its layers and the width of what is between them."""
    theirs.fixed("hidden_act", "silu", "swish")
    theirs.fixed("attention_dropout", 0.0, None)
    theirs.ignore("num_hidden_layers", "full_attention_interval")  # layer_types says as much
    return theirs.tokens() | theirs.take_all(
        "vocab_size",
        "hidden_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
    )


def fixed_where_given(theirs: TheirConfig, **valid: Any) -> None:
    """Understand values that some files have, and of which this library has one alone.

    Raises:
        UserError: for another one.
    """
    for key, value in valid.items():
        if key in theirs.values:
            theirs.fixed(key, value, None)


def read_kinds(theirs: TheirConfig) -> list[str]:
    """Which mixer each layer has, bottom to top.

    Raises:
        UserError: for another kind of layer.
    """
    kinds = theirs.take("layer_types")
    if not set(kinds) <= MIXERS.keys() or len(kinds) != theirs.values["num_hidden_layers"]:
        theirs.refuse(
            "layer_types",
            f"it must name {theirs.values['num_hidden_layers']} layers, {' or '.join(MIXERS)}",
        )
    return [MIXERS[kind] for kind in kinds]


def read_delta(theirs: TheirConfig, **options: Any) -> dict[str, Any]:
    """The mixer of the layers of Gated DeltaNet."""
    key_dim = theirs.take("linear_key_head_dim")
    return {
        "type": "gated_delta",
        "num_heads": theirs.take("linear_num_key_heads"),
        "num_v_heads": theirs.take("linear_num_value_heads"),
        "head_dim": key_dim,
        "expand_v": theirs.take("linear_value_head_dim") / max(key_dim, 1),
        "conv_size": theirs.take("linear_conv_kernel_dim"),
        **options,
    }


def write_delta(ours: OurConfig, **options: Any) -> dict[str, Any]:
    """The values of a config.json for the layers of Gated DeltaNet; none of a model without.

    Args:
        ours: the model.
        options: of these layers that the architecture has in this way alone.

    Raises:
        UserError: for layers that differ, or have options without a place there.
    """
    mixers = ours.mixers("gated_delta")
    if not mixers:
        return {}
    where, spec = f"layer {mixers[0][0]}.mixer", ours.same(mixers)
    for name, expected in options.items():
        if getattr(spec, name) != expected:
            ours.refuse(where, f"{name} {getattr(spec, name)!r}")
    ours.only(where, spec, *_DELTA, *_START_VALUES, *options)
    if spec.conv_size is None:
        ours.refuse(where, "Gated DeltaNet without a convolution")
    heads, value_heads, key_dim, value_dim = spec.sizes(ours.config.hidden_size)
    return {
        "linear_num_key_heads": heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": spec.conv_size,
    }


def write_attention(ours: OurConfig, *held: str, **options: Any) -> tuple[dict[str, Any], Any]:
    """The values of a config.json for the layers of attention, and their options.

    Args:
        ours: the model.
        held: names of options that the map writes itself.
        options: of these layers that the architecture has in this way alone.

    Raises:
        UserError: for a model without such layers, for layers that differ, or that have options
            without a place there.
    """
    mixers = ours.mixers("attention")
    if not mixers:
        ours.refuse("layers", "a model without attention")
    where, spec = f"layer {mixers[0][0]}.mixer", ours.same(mixers)
    for name, expected in options.items():
        if getattr(spec, name) != expected:
            ours.refuse(where, f"{name} {getattr(spec, name)!r}")
    sizes = ("num_heads", "num_key_value_heads", "head_dim")
    ours.only(where, spec, *sizes, *BIASES, *held, *options)
    if spec.qkv_bias != spec.output_bias:
        ours.refuse(where, f"qkv_bias {spec.qkv_bias} with output_bias {spec.output_bias}")
    heads, key_heads, _ = spec.heads(ours.config.hidden_size)
    values = {
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "attention_bias": spec.qkv_bias,
    }
    return values, spec


def check_layers(ours: OurConfig, norms: Mapping[str, str], ffns: Iterable[str]) -> None:
    """Check what stands at the sites of every layer.

    Args:
        ours: the model.
        norms: the mixers that the architecture has, and where the norms of their layers stand.
        ffns: the feed-forward layers that it has.

    Raises:
        UserError: for the first layer that is something else.
    """
    for index, plan in enumerate(ours.plans):
        where = f"layer {index}"
        if plan.mixer is None or plan.mixer[0] not in norms:
            ours.refuse(f"{where}.mixer", repr(plan.mixer and plan.mixer[0]))
        if plan.memory is not None:
            ours.refuse(f"{where}.memory", repr(plan.memory[0]))
        if plan.ffn is None or plan.ffn[0] not in ffns:
            ours.refuse(f"{where}.ffn", repr(plan.ffn and plan.ffn[0]))
        if plan.norm != norms[plan.mixer[0]]:
            ours.refuse(f"{where}.norm", f"{plan.norm!r} around {plan.mixer[0]}")


def swiglu_width(ours: OurConfig) -> int:
    """The width of all its `swiglu` layers; the model's where it has none.

    Raises:
        UserError: where one is wider than another.
    """
    own = ours.config.intermediate_size
    widths = {
        index: plan.ffn[1].intermediate_size or own
        for index, plan in enumerate(ours.plans)
        if plan.ffn[0] == "swiglu"
    }
    first = next(iter(widths.values()), own)
    for index, width in widths.items():
        if width != first:
            ours.refuse(f"layer {index}.ffn", f"intermediate_size {width} beside one of {first}")
    return first


def outer_rules(values: Mapping[str, Any], prefix: str = "model") -> list[Rule]:
    """Embedding, last norm and head.

    Args:
        values: tie_word_embeddings of a config.json.
        prefix: of the names in the checkpoint.
    """
    embedding = f"{prefix}.embed_tokens.weight"
    rules = [
        renamed(embedding, "model.embed_tokens.weight"),
        renamed(f"{prefix}.norm.weight", "model.norm.weight"),
    ]
    if values["tie_word_embeddings"]:
        return [*rules, repeated("lm_head.weight", embedding)]
    return [*rules, renamed("lm_head.weight", "lm_head.weight")]


def same_names(theirs: str, ours: str, names: Iterable[str]) -> list[Rule]:
    """Tensors that are called the same in two modules."""
    return [renamed(f"{theirs}.{name}", f"{ours}.{name}") for name in names]


def swiglu_rules(theirs: str, ours: str) -> list[Rule]:
    """Of a gated feed-forward layer."""
    return same_names(theirs, ours, [f"{name}.weight" for name in PROJECTIONS])
