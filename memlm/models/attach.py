"""A memory for a model that is already trained."""

import types
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from memlm.errors import UserError
from memlm.memory.base import AttendingMemory
from memlm.memory.output_memory import build_output_memory
from memlm.models.added_modules import start
from memlm.models.attach_config import AttachConfig
from memlm.models.attached import AttachedMemory, AttachedMixin, Attachment
from memlm.models.attached_call import AttentionHook, CallCheckpoint, keep_last_hidden
from memlm.models.block import Branch, build_shared
from memlm.models.decoder_layers import (
    DecoderLayer,
    attention_weights,
    decoder_layers,
    position_limit,
)
from memlm.models.lora import add_lora, is_lora_name
from memlm.models.modeling import MemLMForCausalLM


def attach_memory(
    model: PreTrainedModel, config: AttachConfig | Mapping[str, Any]
) -> PreTrainedModel:
    """Give a causal language model of transformers a memory, in place.

    On the chosen layers a branch reads what the attention reads and adds to what it gives. The
    model keeps its modules and the names of its weights, which no longer ask for gradients; what is
    new lies in `model.memory`. Its class becomes a subclass whose `forward` and `generate` carry
    states as those of `MemLMForCausalLM` do. See docs/attach.md.

    Args:
        model: for example a Llama, Mistral, Qwen, Gemma, GPT-2 or OPT model.
        config: `{"memory": {"type": NAME, ...}, "layers": [...], "output": ..., "window": ...}`,
            see `AttachConfig`.

    Returns:
        The same model.

    Raises:
        UserError: for a config that does not fit the model, or a model without standard decoder
            layers. The model is as it was then.
    """
    if isinstance(model, AttachedMixin):
        raise UserError("the model has a memory already; detach_memory() first")
    if not isinstance(config, AttachConfig):
        config = AttachConfig.from_mapping(config)
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise UserError(
            f"a {type(model).__name__} is no causal language model of transformers; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if isinstance(model, MemLMForCausalLM):
        raise UserError(
            "the model is made of blocks of this library; memlm.insert_memory puts memories there"
        )
    layers = decoder_layers(model)
    if hasattr(model, "memory"):
        raise UserError(f"{type(model).__name__} has an attribute `memory` of its own")
    check_weights(model)
    checkpoints = {
        module: CallCheckpoint(module._gradient_checkpointing_func)
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    }
    memory = _build_memory(model, config, layers)
    adapted = config.lora_layers(len(layers))
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    if adapted:
        add_lora({i: model.get_submodule(layers[i].name) for i in adapted}, config.build_lora())
    base_class = type(model)
    attachment = Attachment(
        config=config,
        layers=layers,
        position_limit=position_limit(model),
        window=config.window,
        base_class=base_class,
        handles=[],
        requires_grad=requires_grad,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora_name(name))
    model.memory = memory
    model.attachment = attachment
    model.__class__ = types.new_class(
        f"{base_class.__name__}WithMemory", (AttachedMixin, base_class)
    )
    try:
        model.check_windows()
    except UserError:
        model.detach_memory()
        raise
    for index, layer in enumerate(layers):
        hook, attention = AttentionHook(index, layer.cache_argument), layer.attention(model)
        attachment.handles.append(
            attention.register_forward_pre_hook(hook.before, with_kwargs=True)
        )
        if str(index) in memory.layers:
            attachment.handles.append(attention.register_forward_hook(hook.after, with_kwargs=True))
    if memory.output is not None:
        attachment.handles.append(model.get_decoder().register_forward_hook(keep_last_hidden))
    for module, function in checkpoints.items():
        module._gradient_checkpointing_func = function
    return model


def check_weights(model: nn.Module) -> None:
    """Raise UserError unless all weights are the model's own and have values."""
    for name, parameter in model.named_parameters():
        if is_lora_name(name):
            raise UserError(
                f"the model has adapters of its own ({name}); merge or unload them first, and let "
                "`lora` in the config make new ones"
            )
        if parameter.is_meta:
            raise UserError(
                f"{name} has no values (it is on the meta device); load the model's weights into "
                "memory first"
            )


def _build_memory(
    model: PreTrainedModel, config: AttachConfig, layers: list[DecoderLayer]
) -> AttachedMemory:
    text_config = model.config.get_text_config(decoder=True)
    sizes = types.SimpleNamespace(hidden_size=text_config.hidden_size, rms_norm_eps=1e-6)
    branches = nn.ModuleDict()
    for index in config.chosen_layers(len(layers)):
        weights = attention_weights(model, layers[index])
        spec = config.build_memory()
        if weights is not None:
            spec = spec.for_attention(weights)
        branch = Branch("memory", (config.memory["type"], spec), "none", sizes)
        if isinstance(branch.module, AttendingMemory):
            raise UserError(
                f"attach.memory: {branch.module.name} with these options has an attention of its "
                "own, which would stand beside the model's; choose a memory without one"
            )
        branches[str(index)] = branch
    memory = AttachedMemory(
        branches,
        build_shared(branches.values(), sizes.hidden_size),
        build_output_memory(config.output, sizes.hidden_size, "attach.output"),
    )
    std = getattr(text_config, "initializer_range", None) or 0.02
    start(memory, std, model.device, model.dtype, model.training)
    for index, branch in branches.items():
        weights = attention_weights(model, layers[int(index)])
        if weights is not None:
            branch.module.init_from_attention(weights)
    return memory
