"""The gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from memlm.layers.blockwise import in_blocks


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer 2020, "GLU variants").

    Attributes:
        block_tokens: tokens of a row at a time, see `memlm.models.activations.set_blockwise`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.block_tokens: int | None = None
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size]."""
        return in_blocks(self._transform, self.block_tokens, hidden)

    def _transform(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def flops(self, tokens: int) -> int:
        """Floating point operations of one forward pass over `tokens` tokens."""
        return 6 * tokens * self.gate_proj.weight.numel()
