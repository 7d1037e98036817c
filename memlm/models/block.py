"""One layer of the model: a mixer, an optional memory and a feed-forward site."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from memlm.errors import UserError
from memlm.layers.attention import Attention
from memlm.layers.context import CallContext
from memlm.layers.mlp import SwiGLU
from memlm.layers.moe import MixtureOfExperts
from memlm.layers.norm import RMSNorm
from memlm.layers.sequence_group import tied
from memlm.layers.state import MemoryState
from memlm.layers.state_passing import hand_on, receive_states
from memlm.memory import MemoryModule, memory_class
from memlm.memory.base import AttendingMemory
from memlm.models.configuration import FEED_FORWARDS, SITES, LayerPlan, MemLMConfig

States = dict[str, MemoryState]


class Branch(nn.Module):
    """What stands at one site: its norms, its module and its optional gain.

    norm "pre": f(norm(x)); "post": norm(f(x)); "sandwich": norm(f(norm(x))).
    """

    def __init__(self, site: str, entry: tuple[str, Any], norm: str, config: MemLMConfig):
        super().__init__()
        name, spec = entry
        width, eps = config.hidden_size, config.rms_norm_eps
        if name in ("attention", "sliding_attention"):
            self.module = Attention(spec, config, eps, config.zero_centered_norm)
        elif name == "swiglu":
            self.module = SwiGLU(width, spec.intermediate_size or config.intermediate_size)
        elif name == "moe":
            std = config.initializer_range
            self.module = MixtureOfExperts(spec, width, config.intermediate_size, std)
        else:
            self.module = memory_class(name).build(spec, width, eps)
        self.is_memory = isinstance(self.module, MemoryModule)
        self.stateless = name in FEED_FORWARDS
        self.parallel = site == "memory" and spec.parallel
        before, after = norm in ("pre", "sandwich"), norm in ("post", "sandwich")
        self.norm = _norm(config) if before else nn.Identity()
        self.post_norm = _norm(config) if after else nn.Identity()
        self.gate_start = getattr(spec, "gate", None)
        self.gate = nn.Parameter(torch.empty(width)) if self.gate_start is not None else None
        self.init_weights()

    def init_weights(self) -> None:
        if self.gate is not None:
            init.constant_(self.gate, self.gate_start)

    def init_states(self, name: str, batch_size: int, device=None, dtype=None) -> States:
        """The module's states before the first token by name: none for a stateless module."""
        if self.stateless:
            return {}
        states = {name: self.module.init_state(batch_size, device, dtype)}
        if isinstance(self.module, AttendingMemory):
            own = self.module.init_attention_state(batch_size, device, dtype)
            states[attention_state_name(name)] = own
        return {name: state for name, state in states.items() if state is not None}

    def forward(
        self,
        hidden: Tensor,
        name: str,
        states: States,
        context: CallContext,
        use_memory: bool = True,
    ) -> tuple[Tensor | None, States]:
        """Run the site.

        Args:
            hidden: [B, T, hidden_size].
            name: of its state.
            states: the states of the block.
            context: the documents of the call.
            use_memory: False leaves a memory out; one that attends goes on attending.

        Returns:
            The branch [B, T, hidden_size] to add to the stream, None for a memory left out, and the
            new states of the site.
        """
        attends = isinstance(self.module, AttendingMemory)
        if self.is_memory and not use_memory and not attends:
            return None, {name: states[name]} if name in states else {}
        hidden = self.norm(hidden)
        if context.sequence is not None and name in states and not self.module.shares_sequence:
            output, new_states = self._in_turn(hidden, name, states, context, use_memory)
        else:
            output, new_states = self._run(hidden, name, states, context, use_memory)
        if not isinstance(self.post_norm, nn.Identity):
            output = self.post_norm(output)
        if self.gate is not None:
            # A closed channel adds nothing, also where the module overflows: 0 * inf is NaN.
            closed = (self.gate == 0) & ~output.isfinite()
            output = output.masked_fill(closed, 0) * self.gate
        return output, new_states

    def _in_turn(
        self, hidden: Tensor, name: str, states: States, context: CallContext, use_memory: bool
    ) -> tuple[Tensor, States]:
        """As `_run`, from the state that the process before hands on."""
        names = (name, attention_state_name(name))
        given = {name: states[name] for name in names if name in states}
        given, token = receive_states(given, context.sequence)
        if context.layout.num_tokens:
            alone = dataclasses.replace(context, sequence=None, before=None)
            output, given = self._run(hidden, name, given, alone, use_memory)
        else:
            # DDP waits for gradients of all parameters.
            output = tied(torch.zeros_like(hidden), *self.module.parameters())
        return hand_on(output, given, token, context.sequence), given

    def _run(
        self, hidden: Tensor, name: str, states: States, context: CallContext, use_memory: bool
    ) -> tuple[Tensor, States]:
        """What the module makes of its input, and its new states."""
        state, attention = states.get(name), attention_state_name(name)
        new_states = {}
        if isinstance(self.module, MixtureOfExperts):
            output, state = self.module(hidden, context.layout.valid), None
        elif self.stateless:
            output, state = self.module(hidden), None
        elif isinstance(self.module, AttendingMemory):
            output, state, new_states[attention] = self.module(
                hidden, state, context, states[attention], use_memory
            )
        else:
            output, state = self.module(hidden, state, context)
        if state is not None:
            new_states[name] = state
        return output, new_states


def _norm(config: MemLMConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norm)


def attention_state_name(name: str) -> str:
    """The name of the state of the attention inside the memory called `name`."""
    return f"{name}.attention"


def build_shared(branches: Iterable[Branch], hidden_size: int) -> nn.ModuleDict:
    """The modules that memories with the same `share` use; later ones are told that they follow.

    Raises:
        UserError: for a name that cannot be one, or memories that share it and differ.
    """
    shared = nn.ModuleDict()
    owners: dict[str, Any] = {}
    for branch in branches:
        name = getattr(getattr(branch.module, "config", None), "share", None)
        if not branch.is_memory or name is None:
            continue
        if hasattr(nn.ModuleDict(), name) or "." in name:
            raise UserError(
                f"layers: {name!r} cannot be a name of share; choose one without dots that "
                "is no method of a dictionary, such as 'table'"
            )
        spec = (branch.module.name, branch.module.config)
        if name in owners and owners[name] != spec:
            raise UserError(
                f"layers: the memories that share {name!r} differ; layers with the same "
                "share need the same type and sizes"
            )
        if name in owners:
            branch.module.follows = True
            continue
        owners[name] = spec
        module = memory_class(spec[0]).build_shared(spec[1], hidden_size)
        if module is not None:
            shared[name] = module
    return shared


class Block(GradientCheckpointingLayer):
    """h + mixer, h + memory (or both from the same input, if parallel), h + ffn."""

    def __init__(self, config: MemLMConfig, plan: LayerPlan, index: int):
        super().__init__()
        self.index = index
        for site in SITES:
            entry = getattr(plan, site)
            branch = Branch(site, entry, plan.norm, config) if entry is not None else None
            setattr(self, site, branch)

    def branches(self) -> dict[str, Branch]:
        """The branches that exist, by the name of their state."""
        found = {f"{self.index}.{site}": getattr(self, site) for site in SITES}
        return {name: branch for name, branch in found.items() if branch is not None}

    def state_names(self) -> list[str]:
        """The names that states of this block can have."""
        return [name for own in self.branches() for name in (own, attention_state_name(own))]

    def forward(
        self,
        hidden: Tensor,
        states: States,
        context: CallContext,
        use_memory: bool = True,
    ) -> tuple[Tensor, States]:
        """Run the sites in order.

        Args:
            hidden: [B, T, hidden_size].
            states: the states of this block's branches by name; never changed in place, so
                gradient checkpointing may run the block twice.
            context: the documents of the call.
            use_memory: False leaves every memory out, its state untouched.
        """
        # Nothing but padding; but columns of other processes may hold tokens.
        if context.layout.num_tokens == 0 and context.sequence is None:
            return hidden, states
        new_states = {}
        before = hidden
        for name, branch in self.branches().items():
            source = before if branch.parallel else hidden
            output, branch_states = branch(source, name, states, context, use_memory)
            hidden = hidden if output is None else hidden + output
            new_states.update(branch_states)
        return hidden, new_states
