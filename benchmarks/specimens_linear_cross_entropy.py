"""Configurations of `memlm.cuda.linear_cross_entropy`'s kernels, as launches on meta tensors."""

import dataclasses
import itertools

import torch
from torch import Tensor

from benchmarks.aot import Specimen

KERNELS = frozenset({"forward_kernel", "gradient_kernel", "product_kernel"})


@dataclasses.dataclass(frozen=True)
class Loss:
    """A head of V entries with D channels, forward and backward."""

    V: int = 131072
    D: int = 2048
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    tokens: int = 8192

    @property
    def name(self) -> str:
        words = [
            f"linear_cross_entropy V{self.V} D{self.D} {self.tokens} tokens",
            str(self.dtype).removeprefix("torch."),
            "" if self.softcap is None else "softcap",
        ]
        return " ".join(word for word in words if word)

    def launch(self) -> None:
        from memlm.cuda.linear_cross_entropy import triton_launchers

        hidden, weight = (_empty(n, self.D, dtype=self.dtype) for n in (self.tokens, self.V))
        targets = _empty(self.tokens, dtype=torch.int64)
        _, log_sum = triton_launchers.forward(hidden, weight, targets, -100, self.softcap)
        triton_launchers.backward(
            hidden,
            weight,
            targets,
            log_sum,
            log_sum,
            self.softcap,
            1e-4,
            torch.empty_like(hidden),
            torch.empty_like(weight),
        )


def quick() -> list[Specimen]:
    """Every kernel as it serves each of the two gradients, that of the weight in both forms."""
    return [_specimen(Loss())]


def full() -> list[Specimen]:
    """Types, vocabularies that are no whole tiles, bounded logits and odd widths."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    vocabularies = (32000, 50257, 131072)
    softcaps = (None, 30.0)
    cases = [
        Loss(V, dtype=dtype, softcap=softcap)
        for V, dtype, softcap in itertools.product(vocabularies, dtypes, softcaps)
    ]
    cases += [Loss(32000, D, dtype) for D, dtype in itertools.product((100, 576), dtypes)]
    # More tokens than entries: the other gradient comes first.
    cases.append(Loss(32000, tokens=65536))
    return [_specimen(case) for case in cases if case != Loss()]


def _specimen(case: Loss) -> Specimen:
    longer = dataclasses.replace(case, tokens=case.tokens - 1001)
    return Specimen(case.name, case.launch, longer.launch, KERNELS)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
