"""A table of experts with one hidden unit each, chosen by product keys.

He 2024, "Mixture of A Million Experts" (PEER), arXiv 2407.04153.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.value_table import ValueTable


class ExpertTable(nn.Module):
    """Expert i maps a token x to gelu(down_i . x) up_i.

    Of one layer, or of all layers that share it.

    Args:
        slots: experts.
        size: channels of a token.
    """

    def __init__(self, slots: int, size: int):
        super().__init__()
        self.down = ValueTable(slots, size)
        self.up = ValueTable(slots, size)

    def forward(self, indices: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """Weighted sums [tokens, size] of what experts `indices` [tokens, bag] make of x."""
        return self.up(indices, weights * F.gelu(self.down.dot(indices, x)))
