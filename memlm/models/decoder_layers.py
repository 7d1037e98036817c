"""The decoder layers of a causal language model of transformers, and what they attend to."""

import dataclasses
import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from memlm.errors import UserError
from memlm.layers.attention_weights import AttentionWeights

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # the older models have the second name
_MODEL_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids", "labels", "logits_to_keep")
# Rotary positions whose frequencies change with the length of the text.
_CHANGING_ROPE = ("dynamic", "longrope")
_FULL_PRECISION = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer of a model.

    Attributes:
        name: of the layer in the model, such as `model.layers.3`.
        attention_name: of its attention, such as `model.layers.3.self_attn`.
        cache_argument: under which the attention takes its cache.
        window: tokens that a query sees, itself included; None = all.
    """

    name: str
    attention_name: str
    cache_argument: str
    window: int | None

    def attention(self, model: nn.Module) -> nn.Module:
        """The attention module."""
        return model.get_submodule(self.attention_name)


def decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """The decoder layers from bottom to top.

    Raises:
        UserError: for a model without standard decoder layers, saying what was looked for.
    """
    missing = [name for name in _MODEL_ARGUMENTS if name not in _arguments(model)]
    if missing or model.config.is_encoder_decoder:
        raise _not_standard(model, f"a decoder that takes {', '.join(_MODEL_ARGUMENTS)}")
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            attentions = [_attention(layer) for layer in module]
            if all(attentions):
                windows = _windows(model, count)
                parts = zip(attentions, windows, strict=True)
                return [
                    DecoderLayer(f"{name}.{index}", f"{name}.{index}.{attention}", cache, window)
                    for index, ((attention, cache), window) in enumerate(parts)
                ]
    raise _not_standard(
        model,
        f"a list of {count} layers that each have an attention ({', '.join(ATTENTION_NAMES)}) "
        "with a layer_idx, which takes hidden_states, attention_mask and "
        f"{' or '.join(CACHE_ARGUMENTS)} and no alibi",
    )


def attention_sizes(model: PreTrainedModel, layer: DecoderLayer) -> tuple[int, int, int]:
    """Query heads, key/value heads and channels per head of a layer's attention."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    own = getattr(layer.attention(model), "head_dim", None) or getattr(config, "head_dim", None)
    return heads, kv_heads, own or config.hidden_size // heads


def attention_weights(model: PreTrainedModel, layer: DecoderLayer) -> AttentionWeights | None:
    """The layer's own projections; None where they have unknown names or shapes."""
    attention = layer.attention(model)
    heads, kv_heads, head_dim = attention_sizes(model, layer)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = [_weight(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    for name in ("c_attn", "qkv_proj", "query_key_value"):  # the three in one
        fused = _weight(attention, name)
        if fused is None or fused.shape[0] != sum(sizes):
            continue
        if name == "query_key_value":  # GPT-NeoX: head by head
            if kv_heads != heads:
                continue
            fused = fused.unflatten(0, (heads, 3, head_dim)).transpose(0, 1).flatten(0, 2)
        parts = list(fused.split(sizes))
    outputs = (_weight(attention, name) for name in ("o_proj", "out_proj", "c_proj", "dense"))
    parts.append(next((output for output in outputs if output is not None), None))
    width = model.config.get_text_config(decoder=True).hidden_size
    shapes = [(size, width) for size in sizes] + [(width, sizes[0])]
    for part, shape in zip(parts, shapes, strict=True):
        if part is None or tuple(part.shape) != shape:
            return None
    return AttentionWeights(*parts, heads, kv_heads, head_dim)


def position_limit(model: PreTrainedModel) -> tuple[int | None, bool]:
    """Positions that the model has, and whether they end there even if attention sees less."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return limit, True  # learned for every position
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    changing = [kind for kind in kinds if kind.get("rope_type") in _CHANGING_ROPE]
    if not changing:
        return limit, False
    originals = [kind.get("original_max_position_embeddings", limit) for kind in changing]
    return min(filter(None, originals), default=limit), True


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _attention(layer: nn.Module) -> tuple[str, str] | None:
    """The name of a layer's attention, and the argument under which it takes its cache."""
    for name in ATTENTION_NAMES:
        attention = getattr(layer, name, None)
        if isinstance(attention, nn.Module) and getattr(attention, "layer_idx", None) is not None:
            arguments = _arguments(attention)
            cache = next((found for found in CACHE_ARGUMENTS if found in arguments), None)
            needed = "hidden_states" in arguments and "attention_mask" in arguments
            if cache and needed and "alibi" not in arguments:
                return name, cache
    return None


def _windows(model: PreTrainedModel, count: int) -> list[int | None]:
    """What each layer's attention sees, from the cache that transformers would give it."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or []
    chunked = "chunked_attention" in types or getattr(config, "attention_chunk_size", None)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if chunked or not plain or len(layers) != count:
        raise _not_standard(model, "layers that keep keys and values of all or the last tokens")
    return [getattr(layer, "sliding_window", None) for layer in layers]


def _weight(attention: nn.Module, name: str) -> Tensor | None:
    """The weight of a linear layer as [out, in]; None for a quantized one: its scales are apart."""
    linear = getattr(attention, name, None)
    linear = getattr(linear, "base_layer", linear)  # inside an adapter
    if not isinstance(linear, nn.Linear | Conv1D) or linear.weight.dtype not in _FULL_PRECISION:
        return None
    weight = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _not_standard(model: PreTrainedModel, wanted: str) -> UserError:
    return UserError(
        f"{type(model).__name__} has no standard decoder layers to attach a memory to; looked for "
        f"{wanted}"
    )
