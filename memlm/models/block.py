"""One layer of the model: a mixer, an optional memory and a feed-forward site."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from memlm.layers.attention import Attention
from memlm.layers.context import CallContext
from memlm.layers.mlp import SwiGLU
from memlm.layers.state import MemoryState
from memlm.memory import MemoryModule, memory_class
from memlm.models.configuration import SITES, LayerPlan, MemLMConfig


class Branch(nn.Module):
    """What stands at one site: its norms, its module and its optional gain.

    norm "pre": f(norm(x)); "post": norm(f(x)); "sandwich": norm(f(norm(x))).
    """

    def __init__(self, site: str, entry: tuple[str, Any], norm: str, config: MemLMConfig):
        super().__init__()
        name, spec = entry
        width, eps = config.hidden_size, config.rms_norm_eps
        if name in ("attention", "sliding_attention"):
            self.module = Attention(spec, config, eps)
        elif name == "swiglu":
            self.module = SwiGLU(width, spec.intermediate_size or config.intermediate_size)
        else:
            self.module = memory_class(name)(spec, width, eps)
        self.is_memory = isinstance(self.module, MemoryModule)
        self.parallel = site == "memory" and spec.parallel
        self.norm = nn.RMSNorm(width, eps) if norm in ("pre", "sandwich") else nn.Identity()
        self.post_norm = nn.RMSNorm(width, eps) if norm in ("post", "sandwich") else nn.Identity()
        self.gate_start = getattr(spec, "gate", None)
        self.gate = nn.Parameter(torch.empty(width)) if self.gate_start is not None else None
        self.init_weights()

    def init_weights(self) -> None:
        if self.gate is not None:
            init.constant_(self.gate, self.gate_start)

    def init_state(self, batch_size: int, device=None, dtype=None) -> MemoryState | None:
        """The module's state before the first token, None for a stateless module."""
        if isinstance(self.module, SwiGLU):
            return None
        return self.module.init_state(batch_size, device, dtype)

    def forward(
        self, hidden: Tensor, state: MemoryState | None, context: CallContext
    ) -> tuple[Tensor, MemoryState | None]:
        """The branch [B, T, hidden_size] to add to the stream, and the new state."""
        hidden = self.norm(hidden)
        if isinstance(self.module, SwiGLU):
            output = self.module(hidden)
        else:
            output, state = self.module(hidden, state, context)
        output = self.post_norm(output)
        return (output if self.gate is None else output * self.gate), state


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

    def forward(
        self,
        hidden: Tensor,
        states: dict[str, MemoryState],
        context: CallContext,
        use_memory: bool = True,
    ) -> tuple[Tensor, dict[str, MemoryState]]:
        """Run the sites in order.

        Args:
            hidden: [B, T, hidden_size].
            states: the states of this block's branches by name; never changed in place, so
                gradient checkpointing may run the block twice.
            context: the documents of the call.
            use_memory: False leaves every memory branch out, states untouched.
        """
        if context.layout.num_tokens == 0:  # nothing but padding
            return hidden, states
        new_states = {}
        before = hidden
        for name, branch in self.branches().items():
            state = states.get(name)
            if branch.is_memory and not use_memory:
                new_state = state
            else:
                output, new_state = branch(before if branch.parallel else hidden, state, context)
                hidden = hidden + output
            if new_state is not None:
                new_states[name] = new_state
        return hidden, new_states
