"""Configurations of `memlm.cuda.weighted_bag`'s kernels, as launches on meta tensors."""

import dataclasses
import itertools

import torch
from torch import Tensor

from benchmarks.aot import Specimen

UPDATES = ("lazy_adam", "rowwise_adagrad")
ACTIONS = ("compact", "dense", *UPDATES)


@dataclasses.dataclass(frozen=True)
class Bag:
    """Bags of `length` rows with V channels, forward and backward, and what is done with rows."""

    V: int
    dtype: torch.dtype = torch.bfloat16
    gated: bool = True
    action: str = "lazy_adam"
    tokens: int = 4096
    length: int = 128
    rows: int = 1 << 20

    @property
    def name(self) -> str:
        words = [
            f"weighted_bag {self.V} {str(self.dtype).removeprefix('torch.')}",
            "gated" if self.gated else "",
            f"{self.tokens} tokens",
            self.action,
        ]
        return " ".join(word for word in words if word)

    def launch(self) -> None:
        from memlm.cuda.weighted_bag import Reads, triton_bag, triton_rows

        indices = _empty(self.tokens, self.length, dtype=torch.int32)
        weights = _empty(self.tokens, self.length)
        values, x = (_empty(n, self.V, dtype=self.dtype) for n in (self.rows, self.tokens))
        triton_bag.bag(indices, weights, values, x if self.gated else None)
        triton_bag.dot(indices, x, values)
        found = triton_rows.sort_reads([Reads(indices, weights, x)], self.rows)
        if self.action in UPDATES:
            state = [_empty(self.rows, self.V), _empty(self.rows, self.V)]
            rule = triton_rows.LazyAdam(1e-3, (0.9, 0.99), 1e-8, step=1)
            triton_rows.run(found, self.action, None, values, state, rule)
        else:
            triton_rows.run(found, self.action, _empty(self.rows, self.V))


def quick() -> list[Specimen]:
    """Every kernel once."""
    return [_specimen(Bag(1024))]


def full() -> list[Specimen]:
    """Widths, types, few tokens and everything that is done with rows."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cases = [Bag(V, dtype) for V, dtype in itertools.product((384, 1024, 4096), dtypes)][1:]
    cases += [Bag(1024, action=action) for action in ACTIONS if action != "lazy_adam"]
    cases += [Bag(V, action="rowwise_adagrad") for V in (64, 4096, 8192)]
    cases += [Bag(V, dtype, tokens=4) for V, dtype in itertools.product((100, 1024), dtypes)]
    cases += [Bag(8192, torch.float32), Bag(48), Bag(1024, gated=False)]
    return [_specimen(case) for case in cases]


def _specimen(case: Bag) -> Specimen:
    tokens = 4999 if case.tokens > 4 else 3
    longer = dataclasses.replace(case, tokens=tokens, length=99, rows=(1 << 20) + 1)
    return Specimen(case.name, case.launch, longer.launch)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
