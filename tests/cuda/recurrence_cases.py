"""Inputs of the linear recurrence, and what an implementation makes of them."""

import dataclasses
import os
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda import linear_recurrence
from memlm.cuda.dispatch import VARIABLE

SIZES = ((1, 1, 4, 4), (1, 2, 5, 3), (2, 2, 16, 9), (2, 6, 3, 8))  # H, HV, K, V
DECAYS = ("none", "const", "scalar", "gated")
LENGTHS = (
    (5,),
    (3, 0, 70, 1, 129, 0),
    (0, 0),
    (1, 1, 1),
    (1, 0, 1),
    (64, 128),
    (31, 33, 32, 64, 65),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Which recurrence over which sequences.

    lengths: of the sequences, packed in one row or else equal; sizes: H, HV, K, V; decay: one of
    DECAYS; strength: factor of the log decays, or A where gated; options: named ones that are on.
    """

    lengths: tuple[int, ...]
    sizes: tuple[int, int, int, int] = (1, 2, 5, 3)
    packed: bool = False
    delta: bool = True
    decay: str = "scalar"
    strength: float = 1.0
    options: tuple[str, ...] = ()
    initial_state: bool = True

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        sizes = "x".join(map(str, self.sizes))
        words = [lengths, "packed" * self.packed, sizes, "delta" if self.delta else "additive"]
        words += [self.decay, *self.options, "" if self.initial_state else "fresh"]
        return "-".join(filter(None, words))

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Tensors by argument name; keys are unit vectors unless the operation norms them."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        H, HV, K, V = self.sizes
        N = len(self.lengths)
        B, T = (1, sum(self.lengths)) if self.packed else (N, self.lengths[0])
        tensors = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
        if "qk_l2norm" not in self.options:
            tensors["k"] = F.normalize(tensors["k"], dim=-1)
        if self.decay == "const":
            tensors["log_decay"] = -0.1 * self.strength * normal(HV).abs()
        elif self.decay == "scalar":
            tensors["log_decay"] = -self.strength * normal(B, T, HV).abs()
        elif self.decay == "gated":
            tensors["log_decay"] = normal(B, T, HV)
            tensors["A_log"] = (self.strength * (0.5 + normal(HV).sigmoid())).log()
            tensors["dt_bias"] = normal(HV)
        if self.delta:
            tensors["beta"] = normal(B, T, HV)
            if "beta_sigmoid" not in self.options:
                tensors["beta"] = tensors["beta"].sigmoid()
        if self.initial_state:
            tensors["initial_state"] = normal(N, HV, K, V)
        return {name: x.to(dtype) for name, x in tensors.items()}

    def settings(self) -> dict[str, object]:
        """The other arguments."""
        settings = dict.fromkeys(self.options, True)
        if self.packed:
            settings["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0)
        return settings


def call(implementation: str, tensors: dict[str, Tensor], **settings) -> tuple[Tensor, ...]:
    """`linear_recurrence` by an implementation; a tensor that is missing is None."""
    with mock.patch.dict(os.environ, {VARIABLE: implementation}):
        return linear_recurrence(**{"log_decay": None, "beta": None} | tensors, **settings)


def results(implementation: str, tensors: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a fixed random function of both."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    o, state = call(implementation, leaves, return_state=True, **settings)
    loss = weighted(o, state)
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    found = {"o": o.detach(), "state": state.detach()}
    return found | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def weighted(*tensors: Tensor) -> Tensor:
    """The sum of all entries times fixed normal weights, which are the same in every precision."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for x in tensors:
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        total = total + (x * weights).double().sum()
    return total
