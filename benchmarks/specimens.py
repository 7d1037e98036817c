"""Configurations of every operation's kernels, as launches on meta tensors.

`quick` has each kernel once, in the sizes of the published models, for every run of the tests;
`full` has the sizes, types and switches that the operations promise.
"""

import dataclasses
import functools
import itertools
from unittest import mock

import torch
from torch import Tensor

from benchmarks.aot import Specimen
from memlm.cuda.linear_recurrence import inputs as recurrence

ROWS, TOKENS = 2, 4096
KEY_VALUE_SIZES = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
# Kernels whose products have 64 rows (a chunk) or more, in 16-bit types.
RECURRENCE_PRODUCTS = frozenset(
    {"solve_kernel", "scan_kernel", "reverse_scan_kernel", "gradient_kernel"}
)


def quick() -> list[Specimen]:
    """One configuration per kernel."""
    return [
        _recurrence(Recurrence(128, 128)),
        _recurrence(Recurrence(128, 128, tokens=1)),
    ]


def full() -> list[Specimen]:
    """Every size, type and switch."""
    return [*quick(), *map(_recurrence, _recurrence_matrix())]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """One configuration of `memlm.cuda.linear_recurrence`; segments above 1: split sequences."""

    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    groups: int = 1
    delta: bool = True
    decay: str = "gate"
    packed: bool = False
    tokens: int = TOKENS
    segments: int = 1

    @property
    def name(self) -> str:
        words = [
            f"linear_recurrence {self.K}/{self.V} {str(self.dtype).removeprefix('torch.')}",
            f"G{self.groups}" if self.groups > 1 else "",
            "delta" if self.delta else "additive",
            f"decay={self.decay}",
            "packed" if self.packed else "",
            "step" if self.tokens == 1 else "",
            f"{self.segments} segments" if self.segments > 1 else "",
        ]
        return " ".join(word for word in words if word)

    def inputs(self) -> recurrence.Inputs:
        H, B = 4, 1 if self.packed else ROWS
        HV, T = H * self.groups, self.tokens
        decay_shape = {"none": None, "constant": (HV,)}.get(self.decay, (B, T, HV))
        gate = self.decay == "gate"
        rows = 3 if self.packed else B
        return recurrence.Inputs(
            q=_empty(B, T, H, self.K, dtype=self.dtype),
            k=_empty(B, T, H, self.K, dtype=self.dtype),
            v=_empty(B, T, HV, self.V, dtype=self.dtype),
            log_decay=None if decay_shape is None else _empty(*decay_shape),
            beta=_empty(B, T, HV) if self.delta else None,
            initial_state=_empty(rows, HV, self.K, self.V),
            cu_seqlens=_empty(rows + 1, dtype=torch.int64) if self.packed else None,
            A_log=_empty(HV) if gate else None,
            dt_bias=_empty(HV) if gate else None,
            scale=self.K**-0.5,
            qk_l2norm=self.delta,
            beta_sigmoid=self.delta,
            allow_neg_eigval=False,
        )

    def launch(self) -> None:
        from memlm.cuda.linear_recurrence import triton_launchers as launchers

        inputs = self.inputs()
        with mock.patch.object(launchers, "segments", lambda _: self.segments):
            if self.tokens == 1:
                launchers.forward(inputs, False, False)
                return
            o, state, _, saved = launchers.forward(inputs, True, True)
            launchers.backward(inputs, saved, o, state)


def _recurrence(case: Recurrence) -> Specimen:
    products = case.dtype != torch.float32 and min(case.K, case.V) >= 64
    return Specimen(case.name, case.launch, RECURRENCE_PRODUCTS if products else frozenset())


def _recurrence_matrix() -> list[Recurrence]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cases = [
        Recurrence(K, V, dtype, tokens=tokens)
        for (K, V), dtype, tokens in itertools.product(KEY_VALUE_SIZES, dtypes, (TOKENS, 1))
    ]
    wide = functools.partial(Recurrence, 128, 256)
    cases += [wide(groups=4, packed=packed) for packed in (False, True)]
    cases += [wide(segments=4, packed=packed) for packed in (False, True)]
    cases += [
        wide(delta=delta, decay=decay, packed=packed)
        for delta, decay, packed in itertools.product(
            (True, False), ("none", "constant", "scalar", "gate"), (False, True)
        )
    ]
    # Sizes that fill no power of two: Olmo-Hybrid's, and a small model's.
    cases += [Recurrence(96, 192), Recurrence(24, 48), Recurrence(24, 48, torch.float32)]
    return cases
