"""Titans with sliding-window attention: the memory as a gate (mag) and as a layer (mal).

Behrouz et al., arXiv 2501.00663, sections 4.2 and 4.3. The attention sees `window` tokens and the
persistent tokens; its state is kept apart from the memory's.
"""

from abc import abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from memlm.layers.attention_state import AttentionState
from memlm.layers.persistent_attention import PersistentAttention
from memlm.memory.base import AttendingMemory, CallContext
from memlm.memory.titans_config import TitansConfig
from memlm.memory.titans_memory import TitansMemory, TitansState


class MemoryGate(nn.Module):
    """o_proj(norm(y) * silu(norm(m))): attention y gated with the memory's m.

    Both norms have learned weights per channel, as the paper asks; it leaves the non-linearity
    open. Without m the output is o_proj(norm(y)).
    """

    def __init__(self, hidden_size: int, norm_eps: float):
        super().__init__()
        self.y_norm = nn.RMSNorm(hidden_size, norm_eps)
        self.m_norm = nn.RMSNorm(hidden_size, norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, y: Tensor, m: Tensor | None) -> Tensor:
        """y and m [..., hidden_size]."""
        y = self.y_norm(y)
        return self.o_proj(y if m is None else y * F.silu(self.m_norm(m)))


class _WithWindow(AttendingMemory):
    """What mag and mal have in common."""

    name = "titans"
    config: TitansConfig
    o_norm: nn.Module  # of the heads of the memory

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.memory = TitansMemory(config, hidden_size)
        self.m_proj = nn.Linear(self.memory.heads * self.memory.head_dim, hidden_size, bias=False)
        self.attention = PersistentAttention(
            config.attention(), hidden_size, config.persistent_tokens, norm_eps
        )

    def init_weights(self) -> None:
        """Nothing beside the memory's and the attention's own, linear layers and norms."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> TitansState:
        return self.memory.init_state(batch_size, device, dtype)

    def init_attention_state(self, batch_size: int, device=None, dtype=None) -> AttentionState:
        return self.attention.init_state(batch_size, device, dtype)

    def _remember(
        self, hidden: Tensor, state: TitansState, context: CallContext
    ) -> tuple[Tensor, TitansState]:
        """What the memory says, [B, T, hidden_size], and its new state."""
        layout = context.layout
        o, final = self.memory(
            layout.pack(hidden), layout.incoming(state), layout.cu_seqlens, context.write
        )
        self.memory.finish(layout)
        m = layout.unpack(self.m_proj(self.o_norm(o).flatten(-2)))
        return m, layout.outgoing(final, state) if context.write else state

    @abstractmethod
    def forward(
        self,
        hidden: Tensor,
        state: TitansState,
        context: CallContext,
        attention_state: AttentionState,
        use_memory: bool = True,
    ) -> tuple[Tensor, TitansState, AttentionState]: ...

    def flops(self, tokens: int) -> int:
        inside = self.memory.flops(tokens) + self.attention.flops(tokens)
        return inside + 2 * tokens * self.m_proj.weight.numel()


class TitansMAG(_WithWindow):
    """mag: o = SWAttn(x) gated with M(x). Off: the normed attention alone."""

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.o_norm = nn.Identity()  # the gate has a norm; two in a row blow gradients up
        self.gate = MemoryGate(hidden_size, norm_eps)

    def forward(
        self,
        hidden: Tensor,
        state: TitansState,
        context: CallContext,
        attention_state: AttentionState,
        use_memory: bool = True,
    ) -> tuple[Tensor, TitansState, AttentionState]:
        y, attention_state = self.attention(hidden, attention_state, context)
        m = None
        if use_memory:
            m, state = self._remember(hidden, state, context)
        return self.gate(y, m), state, attention_state

    def flops(self, tokens: int) -> int:
        return super().flops(tokens) + 2 * tokens * self.gate.o_proj.weight.numel()


class TitansMAL(_WithWindow):
    """mal: o = SWAttn(norm(x + M(x))).

    The residual connection around the memory is that of any layer in a stack; the paper's formula
    leaves it out. Off: attention of x.
    """

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.o_norm = nn.RMSNorm(self.memory.head_dim, norm_eps)
        self.norm = nn.RMSNorm(hidden_size, norm_eps)

    def forward(
        self,
        hidden: Tensor,
        state: TitansState,
        context: CallContext,
        attention_state: AttentionState,
        use_memory: bool = True,
    ) -> tuple[Tensor, TitansState, AttentionState]:
        if use_memory:
            m, state = self._remember(hidden, state, context)
            hidden = hidden + m
        o, attention_state = self.attention(self.norm(hidden), attention_state, context)
        return o, state, attention_state
