"""The table of values that product-key memories read."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.cuda import PendingReads, gathered_dot, weighted_bag

if TYPE_CHECKING:
    from memlm.memory.sharded_reads import Sharding


class ValueTable(nn.Module):
    """The values [num_keys^2, value_size] of one layer, or of all layers that share them.

    While `zeroed` it reads as a table of zeros, for ablation (see `zeroed_values`).

    Attributes:
        weight: the values [slots, value_size].
        pending: where the backward pass leaves the table's gradient for an optimizer of rows;
            None leaves a gradient of the whole table in `weight.grad`.
        sharding: how several processes hold the table together (see `shard_values`), or None;
            `weight` is a DTensor then.
    """

    is_value_table = True  # training gives it its own learning rate and no weight decay

    def __init__(self, slots: int, value_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slots, value_size))
        self.zeroed = False
        self.pending: PendingReads | None = None
        self.sharding: Sharding | None = None
        self.init_weights()

    def init_weights(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, indices: Tensor, weights: Tensor, gate: Tensor | None = None) -> Tensor:
        """Weighted sums [tokens, value_size] of rows `indices` [tokens, bag], times silu(gate)."""
        if self.zeroed:
            return indices.new_zeros(len(indices), self.weight.shape[1], dtype=self.weight.dtype)
        if self.sharding is not None:
            return self.sharding.bag(self, indices, weights, gate)
        return weighted_bag(indices, weights, self.weight, gate, self.pending)

    def dot(self, indices: Tensor, x: Tensor) -> Tensor:
        """Products [tokens, bag] of x [tokens, value_size] with rows `indices` [tokens, bag]."""
        if self.zeroed:
            return x.new_zeros(indices.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.sharding is not None:
            return self.sharding.dot(self, indices, x)
        return gathered_dot(indices, x, self.weight, self.pending)


@contextlib.contextmanager
def zeroed_values(model: nn.Module) -> Iterator[None]:
    """While active, every product-key memory of `model` reads a table of zeros.

    The memory's ablation: it carries no state that could be reset or swapped.
    """
    tables = [module for module in model.modules() if isinstance(module, ValueTable)]
    before = [table.zeroed for table in tables]
    for table in tables:
        table.zeroed = True
    try:
        yield
    finally:
        for table, zeroed in zip(tables, before, strict=True):
            table.zeroed = zeroed
