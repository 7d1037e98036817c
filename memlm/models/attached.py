"""What `attach_memory` adds to the class of a model: states, memories and generation with them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.layers.state import MemoryState
from memlm.memory import MemoryModule
from memlm.memory.output_memory import (
    OUTPUT,
    WEIGHTS,
    OutputMemory,
    apply_output_memory,
    init_output_states,
)
from memlm.models.attach_config import AttachConfig
from memlm.models.attached_call import AttachedCall, CallCheckpoint, state_name
from memlm.models.attached_files import save_attached
from memlm.models.cache import MemLMCache, carried
from memlm.models.decoder_layers import DecoderLayer, attention_sizes
from memlm.models.documents import PositionState, advance, call_layout, longest_context
from memlm.models.generation import MemoryGeneration
from memlm.models.hub_model import PushWithCard
from memlm.models.key_values import KeyValues, KeyValueState
from memlm.models.lora import remove_lora
from memlm.models.modeling import MemLMForCausalLM, MemLMOutput

States = dict[str, MemoryState]


class AttachedMemory(nn.Module):
    """The memories of a model.

    Attributes:
        layers: the branch of every decoder layer that has one, by its number.
        shared: modules that memories with the same `share` use.
        output: the output memory, None without one.
    """

    def __init__(self, layers: nn.ModuleDict, shared: nn.ModuleDict, output: OutputMemory | None):
        super().__init__()
        self.layers = layers
        self.shared = shared
        self.output = output


@dataclasses.dataclass
class Attachment:
    """What has to be known to use a memory, and to take it off again.

    Attributes:
        config: what the memory was made from.
        layers: the decoder layers of the model.
        position_limit: positions that the model has, and whether a window lifts the limit.
        window: the cap on what attention sees; None = as in the model.
        base_class: the model's class without the memory.
        handles: the hooks on its attention layers.
        requires_grad: of the model's own parameters before, by name.
    """

    config: AttachConfig
    layers: list[DecoderLayer]
    position_limit: tuple[int | None, bool]
    window: int | None
    base_class: type
    handles: list[Any]
    requires_grad: dict[str, bool]


def _refuse_other_losses(arguments: dict[str, Any]) -> None:
    """Take away what asks for the loss that the model has by itself; anything else is an error."""
    for name in ("token_weights", "z_loss", "skip_logits"):
        value = arguments.pop(name, None)
        if isinstance(value, Tensor) or value:
            raise UserError(
                f"{name}: the loss of a pretrained model is its own, made of logits; leave it out, "
                "or make the loss from `logits`"
            )


class AttachedMixin(MemoryGeneration, PushWithCard):
    """Comes before the model's own class; see `attach_memory`."""

    memory: AttachedMemory
    attachment: Attachment

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        memory_states: States | None = None,
        past_key_values: MemLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        write_memory: bool = True,
        logits_to_keep: int | Tensor = 0,
        return_memory_states: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MemLMOutput | tuple:
        """Predict the next token.

        Arguments and output as in `MemLMForCausalLM.forward`, but the loss is the model's own;
        `kwargs` go to the model itself. The states hold the keys and values of the model's
        attention under the name `base`.

        Raises:
            UserError: when the model does not allow so long a context, for a Cache that cannot hold
                memories, for states of another memory or number of rows, or for `token_weights`,
                `z_loss` or `skip_logits`.
        """
        _refuse_other_losses(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        caches = self.config.use_cache and not self.training
        going = carried(memory_states, past_key_values, return_memory_states, use_cache, caches)
        given = going.states

        tokens = inputs_embeds if input_ids is None else input_ids
        states = self.init_states(tokens.shape[0]) if given is None else given
        names = self.memory_state_names()
        if states.keys() != {"base", "position", *names}:
            raise UserError(
                f"the states are those of another model or memory: they are {sorted(states)}, but "
                f"this one has {sorted(['base', 'position', *names])}"
            )
        masks = (attention_mask, segment_ids, position_ids)
        context = self._call_context(tokens, *masks, given, input_ids, write_memory)
        attachment, layout = self.attachment, context.layout
        key_values = KeyValues(
            states["base"],
            context,
            [layer.window for layer in attachment.layers],
            attachment.window,
            self.config._attn_implementation,
        )
        carries = going.returns_states or going.cache is not None
        memory_states = {name: states[name] for name in names}
        call = AttachedCall(
            self.memory.layers, memory_states, context, key_values, carries, use_memory
        )
        plain = given is None and layout.uniform and position_ids is None
        with call.active():
            output = super().forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                # Without a mask or positions the model takes its own fast paths.
                attention_mask=None if layout.uniform else layout.valid.long(),
                position_ids=None if plain else context.position_ids,
                labels=labels if self.memory.output is None else None,
                use_cache=False,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        new_states = call.finish()
        logits, loss = output.logits, output.loss
        if self.memory.output is not None:
            hidden, call.last_hidden = call.last_hidden, None
            context.shared[WEIGHTS] = self.weights_fingerprint
            logits, output_states = apply_output_memory(
                self.memory.output, hidden, logits, states, context, use_memory, logits_to_keep
            )
            new_states.update(output_states)
            if labels is not None:
                vocab_size = self.config.get_text_config(decoder=True).vocab_size
                loss = self.loss_function(logits, labels, vocab_size, **kwargs)
        if carries:
            new_states["base"] = key_values.finish()
            new_states["position"] = advance(states["position"], context.position_ids, layout)
        if going.cache is not None:
            going.cache.store(new_states, tokens.shape[1])
        output = MemLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=going.cache if going.returns_cache else None,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            memory_states=new_states if going.returns_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _call_context(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        given: States | None,
        input_ids: Tensor | None,
        write_memory: bool,
    ) -> CallContext:
        carried = None if given is None else given["position"]
        masks = (attention_mask, segment_ids, position_ids)
        layout, position_ids = call_layout(*masks, carried, tokens)
        limit = self.max_context
        if limit is not None:
            longest = longest_context(position_ids, layout)
            if longest > limit:
                raise UserError(
                    f"the context has {longest} tokens, but {type(self).__name__} allows {limit}"
                    + self._longer_context()
                )
        return CallContext(
            layout,
            position_ids,
            write=write_memory,
            shared=dict(self.memory.shared.items()),
            input_ids=input_ids,
        )

    def _longer_context(self) -> str:
        """What would allow a longer context, to end a sentence with."""
        if self.attachment.position_limit[1]:
            return " (it has no positions beyond)"
        return "; attach the memory with a `window` to go on beyond"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the memory (and adapters) without the model's own weights; see `memlm.load_memory`.

        Arguments as in transformers; those that concern shards mean nothing here.
        """
        if is_main_process:
            save_attached(self, save_directory, state_dict)
        if push_to_hub:
            repository = kwargs.pop("repo_id", Path(save_directory).name)
            names = ("commit_message", "private", "token", "revision", "create_pr")
            self.push_to_hub(repository, **{n: kwargs[n] for n in names if n in kwargs})

    def detach_memory(self) -> "AttachedMixin":
        """Take the memory off: the model is the one that it was before, in every bit."""
        attachment = self.attachment
        for handle in attachment.handles:
            handle.remove()
        layers = attachment.layers
        adapted = attachment.config.lora_layers(len(layers))
        remove_lora(self.get_submodule(layers[index].name) for index in adapted)
        del self.memory, self.attachment
        self.__class__ = attachment.base_class
        for name, parameter in self.named_parameters():
            # Wrappers may have renamed some of them, or added their own, since.
            parameter.requires_grad_(attachment.requires_grad.get(name, parameter.requires_grad))
        for module in self.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, CallCheckpoint):
                module._gradient_checkpointing_func = function.function
        return self

    def init_states(self, batch_size: int) -> States:
        """The states of `batch_size` rows before their first token."""
        device, dtype = self.device, self.dtype
        sizes = [attention_sizes(self, layer)[1:] for layer in self.attachment.layers]
        states: States = {
            "position": PositionState(torch.zeros(batch_size, dtype=torch.int64, device=device)),
            "base": KeyValueState.empty(batch_size, sizes, device, dtype),
        }
        return states | self._memory_states(batch_size, device, dtype)

    def memory_state_names(self) -> list[str]:
        """The names in `memory_states` that belong to memories."""
        return list(self._memory_states(1, torch.device("meta")))  # a store can be large

    def _memory_states(
        self, batch_size: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> States:
        states: States = {}
        for index, branch in self.memory.layers.items():
            states.update(branch.init_states(state_name(int(index)), batch_size, device, dtype))
        return states | init_output_states(self.memory.output, batch_size, device, dtype)

    def memories(self) -> dict[str, MemoryModule | OutputMemory]:
        """All memory modules by the name of their site."""
        memories = {
            state_name(int(index)): branch.module for index, branch in self.memory.layers.items()
        }
        return memories if self.memory.output is None else {**memories, OUTPUT: self.memory.output}

    @property
    def max_context(self) -> int | None:
        """Longest context in tokens, None where nothing limits it."""
        limit, always = self.attachment.position_limit
        return limit if always or self.attention_reach is None else None

    @property
    def attention_reach(self) -> int | None:
        """How many tokens back attention can look through all layers together; None = all."""
        windows = self._windows()
        return None if None in windows else sum(window - 1 for window in windows)

    def _windows(self) -> list[int | None]:
        cap = self.attachment.window
        return [
            min(filter(None, (layer.window, cap)), default=None) for layer in self.attachment.layers
        ]

    def set_attention_window(self, window: int | None) -> None:
        """Cap what attention sees at `window` tokens (None = as attached).

        Raises:
            UserError: for a window shorter than a memory's segment: some tokens would be visible
                nowhere.
        """
        before, attached = self.attachment.window, self.attachment.config.window
        self.attachment.window = min(filter(None, (window, attached)), default=None)
        try:
            self.check_windows()
        except UserError:
            self.attachment.window = before
            raise

    def check_windows(self) -> None:
        """Raise UserError where a memory's segment is longer than the window beside it."""
        windows = self._windows()
        for index, branch in self.memory.layers.items():
            window, delay = windows[int(index)], branch.module.config.delay
            if window is not None and window < delay:
                raise UserError(
                    f"layer {index}: an attention window of {window} is shorter than the memory's "
                    f"segment ({delay}), so some tokens would be visible nowhere; use at least "
                    f"{delay}"
                )

    def flops(self, tokens: int) -> int:
        """Floating point operations of a forward pass over one row of `tokens` tokens."""
        weights = {
            id(module.weight): module.weight.numel()
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and not name.startswith("memory.")
        }
        flops = 2 * tokens * sum(weights.values())
        for layer, window in zip(self.attachment.layers, self._windows(), strict=True):
            heads, _, head_dim = attention_sizes(self, layer)
            reach = min(window or tokens, tokens)
            flops += 4 * (tokens * reach - reach * (reach - 1) // 2) * heads * head_dim
        return flops + sum(memory.flops(tokens) for memory in self.memories().values())

    weights_fingerprint = MemLMForCausalLM.weights_fingerprint

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs: Any
    ) -> None:
        function = CallCheckpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **kwargs)
