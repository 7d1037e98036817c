"""Titans' neural long-term memory: a small network per head that learns while it reads.

Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663. The
variants: lmm, the memory as a token mixer of its own (here); mag and mal (`titans_attention`); mac
(`titans_mac`).

Where the paper is silent or ambiguous:

- Gates are per token and head, the read is inclusive, the gradient is taken at the weights of the
  chunk's start; `chunk_size` belongs to the function and must not change after training.
- The inner learning rate is bounded, ``theta = theta_max * sigmoid(...)``, and the momentum is an
  average, ``S_t = eta S_{t-1} - (1 - eta) theta grad``: with the paper's form the step is larger by
  ``1 / (1 - eta)``, which together with gradients that are stale for a whole chunk diverges on
  repeated keys. ``average_momentum: false`` gives the paper's form.
- From depth 2 on the memory ends in a layer norm, so gradients grow as the weights fade, and a
  decay that is harmless at depth 1 makes the outer gradient explode. The decay starts at
  sigmoid(-9) at depth 2 and at sigmoid(-11) above, with a fifth of the step there: see
  docs/neural_memory.md.
- The initial weights are learned.
"""

from torch import Tensor, nn

from memlm.layers.gated_norm import GatedRMSNorm
from memlm.memory.base import CallContext, MemoryModule, register
from memlm.memory.titans_attention import TitansMAG, TitansMAL
from memlm.memory.titans_config import TitansConfig
from memlm.memory.titans_mac import TitansMAC
from memlm.memory.titans_memory import TitansMemory, TitansState


@register("titans", TitansConfig)
class Titans(MemoryModule):
    """lmm: the memory -> gated norm -> output.

    A token reads after its own write. With `context.write` False, tokens read the given weights
    as they are: nothing decays, no momentum is added, nothing is learned between them.
    """

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.memory = TitansMemory(config, hidden_size)
        H, D = self.memory.heads, self.memory.head_dim
        self.g_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.o_norm = GatedRMSNorm(D, norm_eps)
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)

    @classmethod
    def build(cls, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6) -> MemoryModule:
        config.check_sizes(hidden_size)
        variants = {"lmm": cls, "mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL}
        return variants[config.variant](config, hidden_size, norm_eps)

    def init_weights(self) -> None:
        """Nothing beside the memory's own, linear layers and norms."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> TitansState:
        return self.memory.init_state(batch_size, device, dtype)

    def forward(
        self, hidden: Tensor, state: TitansState, context: CallContext
    ) -> tuple[Tensor, TitansState]:
        layout = context.layout
        x = layout.pack(hidden)
        o, final = self.memory(x, layout.incoming(state), layout.cu_seqlens, context.write)
        self.memory.finish(layout)
        o = self.o_norm(o, self.g_proj(x))
        output = layout.unpack(self.o_proj(o.flatten(-2)))
        return output, layout.outgoing(final, state) if context.write else state

    def flops(self, tokens: int) -> int:
        matrices = self.g_proj.weight.numel() + self.o_proj.weight.numel()
        return 2 * tokens * matrices + self.memory.flops(tokens)
