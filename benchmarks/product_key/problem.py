"""The layer both compute: its sizes, its inputs, and ours with the parameters of the other."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memlm.cuda import product_key_select
from memlm.cuda.dispatch import VARIABLE
from memlm.memory import ValueTable


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes: n half keys of d / 2 channels in each half, n * n values of d channels, T tokens."""

    n: int
    d: int = 256
    heads: int = 4
    k: int = 32
    T: int = 2048

    def __str__(self) -> str:
        return f"{self.n}^2 slots"

    def peer(self) -> nn.Module:
        """lucidrains' layer, with new parameters that are always the same."""
        from product_key_memory import PKM

        torch.manual_seed(0)
        return PKM(self.d, self.heads, self.n, self.k, self.d // 2)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Tokens [1, T, d] that take a gradient, and the gradient of the output."""
        generator = torch.Generator().manual_seed(1)
        x, dout = torch.randn(2, 1, self.T, self.d, generator=generator)
        return x.requires_grad_(), dout


class Layer(nn.Module):
    """lucidrains' layer with our operations: softmax over the chosen keys, a sum over the heads."""

    def __init__(self, problem: Problem, peer: nn.Module):
        super().__init__()
        self.problem, heads = problem, problem.heads
        self.to_queries = nn.Linear(problem.d, heads * problem.d, bias=False)
        self.norm = nn.LayerNorm(problem.d // 2)
        self.keys = nn.Parameter(peer.keys.detach().permute(0, 2, 1, 3).clone())
        self.values = ValueTable(problem.n**2, problem.d)
        with torch.no_grad():
            # Its queries are ordered by half, then head; ours by head, then half.
            rows = peer.to_queries.weight.view(2, heads, problem.d // 2, problem.d)
            self.to_queries.weight.copy_(rows.transpose(0, 1).flatten(0, 2))
            self.values.weight.copy_(peer.values.weight)
        self.norm.load_state_dict(peer.norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        query = self.to_queries(tokens).view(len(tokens), self.problem.heads, 2, -1)
        indices, weights = product_key_select(self.norm(query), self.keys, self.problem.k)
        return self.values(indices.flatten(1), weights.flatten(1)).view_as(x)


@contextlib.contextmanager
def kernels(name: str) -> Iterator[None]:
    """Force an implementation of every operation."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
