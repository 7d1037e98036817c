"""The language model: embedding, blocks, norm and head, with the states of all memories."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm.errors import UserError
from memlm.fingerprint import fingerprint
from memlm.layers.attention import Attention
from memlm.layers.context import CallContext
from memlm.layers.norm import RMSNorm
from memlm.layers.sequence_group import SequenceGroup
from memlm.layers.state import MemoryState
from memlm.layers.state_passing import share_states
from memlm.memory import MemoryModule
from memlm.memory.output_memory import (
    OUTPUT,
    WEIGHTS,
    OutputMemory,
    apply_output_memory,
    build_output_memory,
    init_output_states,
)
from memlm.memory.titans_memory import TitansMemory
from memlm.models.block import Block, build_shared
from memlm.models.cache import MemLMCache, carried
from memlm.models.configuration import MemLMConfig
from memlm.models.documents import PositionState, advance, call_layout, longest_context
from memlm.models.generation import MemoryGeneration
from memlm.models.head_loss import HeadLoss, cap_logits
from memlm.models.hidden_states import room_for_hidden_states
from memlm.models.hub_model import HubModel
from memlm.models.sequence import own_columns, own_targets, refuse_call, refuse_model
from memlm.models.start_values import init_module

States = dict[str, MemoryState]
PARTS_FOLDER = "parts"  # of a checkpoint: what each process wrote of weights and moments


@dataclasses.dataclass
class MemLMOutput(CausalLMOutputWithPast):
    """Adds `memory_states`: every state of the batch by name, when they were asked for.

    `hidden_states` are as of Llama in transformers: what every block is given, [B, T, hidden_size],
    and the output of the last one behind the last norm, which the head is given. `token_losses`
    are of a loss without logits: nats [B, T] of each token's target, detached, 0 where it has none.
    """

    memory_states: States | None = None
    token_losses: Tensor | None = None


class MemLMPreTrainedModel(HubModel):
    """Weight initialisation and what transformers has to know."""

    config_class = MemLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "memory_states"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "gates_bias", "initial_weights"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and models of other libraries as models of this one.

        Warns of memories that compute something else than was trained.

        Raises:
            UserError: for a checkpoint whose weights are in parts, or of an architecture that is
                not among `memlm.models.interop.ARCHITECTURES`.
        """
        from memlm.models.interop.load import load_foreign, names_foreign

        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        _refuse_parts(str(source))
        if names_foreign(source, kwargs):
            return load_foreign(super().from_pretrained, source, kwargs)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, TitansMemory):
                module.warn_of_conventions()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config.initializer_range)


def _refuse_parts(source: str) -> None:
    folder = Path(source)
    if (folder / PARTS_FOLDER).is_dir() and not any(folder.glob("model*.safetensors")):
        raise UserError(
            "the weights are in parts, for a run to go on from; to make them whole: "
            f"python -m memlm.training.consolidate {shlex.quote(source)} FOLDER"
        )


class MemLMModel(MemLMPreTrainedModel):
    """The decoder without a head."""

    # The processes that hold the rows of every call together; None = each call has whole rows.
    sequence_group: SequenceGroup | None = None

    def __init__(self, config: MemLMConfig):
        super().__init__(config)
        plans = config.plan()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, plan, index) for index, plan in enumerate(plans))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norm)
        branches = [branch for block in self.layers for branch in block.branches().values()]
        self.shared = build_shared(branches, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def init_states(self, batch_size: int) -> States:
        """The states of `batch_size` rows before their first token."""
        weight = self.embed_tokens.weight
        states: States = {
            "position": PositionState(
                torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
            )
        }
        for block in self.layers:
            for name, branch in block.branches().items():
                states.update(branch.init_states(name, batch_size, weight.device, weight.dtype))
        return states

    def memory_state_names(self) -> list[str]:
        """The names in `memory_states` that belong to memories."""
        return [
            name
            for block in self.layers
            for name, branch in block.branches().items()
            if branch.is_memory and name in branch.init_states(name, 1)
        ]

    def memories(self) -> dict[str, MemoryModule]:
        """All memory modules by the name of their site."""
        return {
            name: branch.module
            for block in self.layers
            for name, branch in block.branches().items()
            if branch.is_memory
        }

    @property
    def max_context(self) -> int | None:
        """Longest context in tokens, None where nothing limits it."""
        full = any(
            isinstance(module, Attention) and module.configured_window is None
            for module in self.modules()
        )
        return self.config.max_position_embeddings if full else None

    def set_sequence_group(self, group: SequenceGroup | None) -> None:
        """Share the rows of every call among processes, or no longer (None).

        Each of them then makes every call, with the whole rows (tokens, masks, positions, labels)
        and the states at their start. Hidden states, logits and the loss are those of its own
        columns; losses and gradients add up over the processes. States that are returned are those
        at the end of the whole rows, the same on all processes, without gradient.

        Raises:
            UserError: for a memory that normalises over the tokens of a call.
        """
        if group is not None:
            refuse_model(self)
        self.sequence_group = group

    def set_attention_window(self, window: int | None) -> None:
        """Cap the window of every sliding attention (None = as configured).

        Raises:
            UserError: for a window shorter than the segment of the memory beside it or around it:
                some tokens would be visible nowhere.
        """
        for index, block in enumerate(self.layers):
            memories = [b for b in (block.mixer, block.memory) if b is not None and b.is_memory]
            delay = max((branch.module.config.delay for branch in memories), default=1)
            for branch in block.branches().values():
                for attention in branch.modules():
                    if not isinstance(attention, Attention) or attention.configured_window is None:
                        continue
                    capped = min(attention.configured_window, window or attention.configured_window)
                    if branch is block.mixer and capped < delay:
                        raise UserError(
                            f"layer {index}: an attention window of {capped} is shorter than the "
                            f"memory's segment ({delay}), so some tokens would be visible nowhere; "
                            f"use at least {delay}"
                        )
                    attention.window = capped

    def flops(self, tokens: int) -> int:
        """Floating point operations of a forward pass over one row, without the head."""
        return sum(
            branch.module.flops(tokens)
            for block in self.layers
            for branch in block.branches().values()
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        memory_states: States | None = None,
        inputs_embeds: Tensor | None = None,
        use_memory: bool = True,
        write_memory: bool = True,
        hidden_states: list[Tensor] | None = None,
        return_states: bool = True,
    ) -> tuple[Tensor, States]:
        """Hidden states [B, T, hidden_size] after the last norm, and the new states.

        Args:
            hidden_states: those on the way are put into it, in the order of `MemLMOutput`.
            return_states: False = the new states are not wanted; with a sequence group they then
                do not travel to all processes.

        Other arguments as in `MemLMForCausalLM.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        sequence = self.sequence_group
        rows = own = input_ids if inputs_embeds is None else inputs_embeds
        if sequence is not None:
            own = rows[:, sequence.columns(rows.shape[1])]
        hidden = self.embed_tokens(own) if inputs_embeds is None else own
        batch_size = hidden.shape[0]
        states = self.init_states(batch_size) if memory_states is None else memory_states
        masks = (attention_mask, segment_ids, position_ids)
        whole = hidden if sequence is None else rows
        context = self.call_context(whole, *masks, memory_states, input_ids, write_memory)
        self._check_length(context)
        following = advance(states["position"], context.position_ids, context.layout)
        if sequence is not None:
            context = own_columns(context, sequence)
        new_states: States = {"position": following}
        for block in self.layers:
            if hidden_states is not None:
                hidden_states.append(hidden)
            own = {name: states[name] for name in block.state_names() if name in states}
            hidden, block_states = block(hidden, own, context, use_memory)
            new_states.update(block_states)
        hidden = self.norm(hidden)
        if hidden_states is not None:
            hidden_states.append(hidden)
        if sequence is not None and return_states:
            new_states = share_states(new_states, sequence)
        return hidden, new_states

    def call_context(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        memory_states: States | None,
        input_ids: Tensor | None,
        write_memory: bool,
    ) -> CallContext:
        """What every layer is told of a call; `hidden` [B, T, ...] gives its shape and device.

        Other arguments as in `MemLMForCausalLM.forward`.
        """
        carried = None if memory_states is None else memory_states["position"]
        masks = (attention_mask, segment_ids, position_ids)
        layout, position_ids = call_layout(*masks, carried, hidden)
        return CallContext(
            layout,
            position_ids,
            write=write_memory,
            shared=dict(self.shared.items()),
            input_ids=input_ids,
        )

    def _check_length(self, context: CallContext) -> None:
        limit = self.config.max_position_embeddings
        if limit is None:
            return
        longest = longest_context(context.position_ids, context.layout)
        # Last, because all modules are looked at: whether there is a limit.
        if longest > limit and self.max_context is not None:
            raise UserError(
                f"the context has {longest} tokens, but this model's full attention allows "
                f"{limit} (max_position_embeddings)"
            )


class MemLMForCausalLM(MemoryGeneration, MemLMPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MemLMConfig):
        super().__init__(config)
        self.model = MemLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output_memory = build_output_memory(config.output, config.hidden_size)
        self.post_init()

    @can_return_tuple
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        shift_labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        z_loss: float = 0.0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MemLMOutput:
        """Predict the next token.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, T] or [B, past + T], 0 at padding.
            segment_ids: int64 [B, T], 0 at padding, another number for every document of a row.
            position_ids: int64 [B, T], position within the document; 0 starts a document.
            labels: int64 [B, T], the input shifted inside as in transformers, -100 = no target.
            memory_states: what an earlier call returned; the tokens continue its rows.
            past_key_values: the same as a Cache, as generate() uses it.
            use_memory: False = every memory branch is exactly zero and no memory is written; one
                that contains attention (`AttendingMemory`) goes on attending without it.
            write_memory: False = memories are read, never written.
            logits_to_keep: logits of the last so many tokens only (0 = all), or their indices.
            return_memory_states: return the states also when none were passed.
            output_hidden_states: return those of every layer; None = as the config says.
            output_attentions: refused where true; None = as the config says.
            shift_labels: int64 [B, T], the targets, in place of `labels`; with a sequence group
                those of this process's columns, as `token_weights`.
            token_weights: float [B, T]: the loss is the sum of the tokens' losses times these, not
                their mean. The target counts where it is predicted.
            z_loss: weight of the square of the logarithm of the softmax's denominator in the loss.
            skip_logits: make the loss without logits, which are None then; None = in training.
            kwargs: `num_items_in_batch` and `ignore_index` of the loss, as in transformers.

        Raises:
            UserError: when full attention does not allow so long a context, for a Cache that
                cannot hold memories, when weights of attention are asked for, or `skip_logits`
                where logits are needed.
        """
        between = room_for_hidden_states(self.config, output_hidden_states, output_attentions)
        sequence = self.model.sequence_group
        caches = self.config.use_cache and not self.training and sequence is None
        going = carried(memory_states, past_key_values, return_memory_states, use_cache, caches)
        given = going.states
        if sequence is not None:
            refuse_call(going.cache is not None, logits_to_keep, self.output_memory is not None)

        hidden, states = self.model(
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            memory_states=given,
            inputs_embeds=inputs_embeds,
            use_memory=use_memory,
            write_memory=write_memory,
            hidden_states=between,
            return_states=going.returns_states or going.cache is not None,
        )
        if sequence is not None:
            targets = (labels, shift_labels, token_weights)
            shift_labels, kwargs = own_targets(*targets, kwargs, sequence)
            labels = None
        head_loss = HeadLoss(self, labels, shift_labels, token_weights, z_loss, kwargs)
        logits = loss = token_losses = None
        if head_loss.skips_logits(skip_logits, logits_to_keep):
            loss, token_losses = head_loss.of_hidden(hidden)
        else:
            keep = logits_to_keep
            kept = slice(-keep, None) if isinstance(keep, int) else keep
            logits = self.lm_head(hidden[:, kept])
            logits = cap_logits(logits, self.config.final_logit_softcapping)
        if self.output_memory is not None:
            masks = (attention_mask, segment_ids, position_ids)
            context = self.model.call_context(hidden, *masks, given, input_ids, write_memory)
            context.shared[WEIGHTS] = self.weights_fingerprint
            logits, output_states = apply_output_memory(
                self.output_memory, hidden, logits, given, context, use_memory, logits_to_keep
            )
            states.update(output_states)
        if going.cache is not None:
            going.cache.store(states, hidden.shape[1])
        if logits is not None and head_loss.wanted:
            loss = head_loss.of_logits(logits)
        return MemLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=going.cache if going.returns_cache else None,
            hidden_states=None if between is None else tuple(between),
            memory_states=states if going.returns_states else None,
            token_losses=token_losses,
        )

    def set_output_memory(self, output: str | dict[str, Any] | None) -> None:
        """Put another output memory behind the head, or none; `config.output` says so then.

        Args:
            output: as in `MemLMConfig`.

        Raises:
            UserError: for an unknown name or key, or a wrong value.
        """
        self.output_memory = build_output_memory(output, self.config.hidden_size)
        self.config.output = output

    def weights_fingerprint(self) -> str:
        """The fingerprint of all weights: stores of hidden states belong to one set of them."""
        return fingerprint(self.state_dict())

    def init_states(self, batch_size: int) -> States:
        """The states of `batch_size` rows before their first token."""
        weight = self.lm_head.weight
        output = init_output_states(self.output_memory, batch_size, weight.device, weight.dtype)
        return self.model.init_states(batch_size) | output

    def memory_state_names(self) -> list[str]:
        """The names in `memory_states` that belong to memories."""
        return [*self.model.memory_state_names(), *init_output_states(self.output_memory, 1)]

    def memories(self) -> dict[str, MemoryModule | OutputMemory]:
        """All memory modules by the name of their site."""
        memories = self.model.memories()
        return memories if self.output_memory is None else {**memories, OUTPUT: self.output_memory}

    @property
    def max_context(self) -> int | None:
        """Longest context in tokens, None where nothing limits it."""
        return self.model.max_context

    @property
    def sequence_group(self) -> SequenceGroup | None:
        """The processes that hold the rows of every call together; None = whole rows."""
        return self.model.sequence_group

    def set_sequence_group(self, group: SequenceGroup | None) -> None:
        """Share the rows of every call among processes (see `MemLMModel.set_sequence_group`).

        Raises:
            UserError: as there, and for an output memory.
        """
        if group is not None:
            refuse_call(False, 0, self.output_memory is not None)
        self.model.set_sequence_group(group)

    def set_attention_window(self, window: int | None) -> None:
        """Cap the window of every sliding attention (None = as configured)."""
        self.model.set_attention_window(window)

    def flops(self, tokens: int) -> int:
        """Floating point operations of a forward pass over one row of `tokens` tokens."""
        flops = self.model.flops(tokens) + 2 * tokens * self.lm_head.weight.numel()
        return flops + (self.output_memory.flops(tokens) if self.output_memory is not None else 0)
