"""Configurations of every operation's kernels, as launches on meta tensors.

`quick` has each kernel once, in the sizes of the published models, for every run of the tests;
`full` has the sizes, types and switches that the operations promise.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks import (
    specimens_linear_cross_entropy,
    specimens_product_key,
    specimens_topk_search,
    specimens_weighted_bag,
)
from benchmarks.aot import Specimen
from memlm.cuda.diagonal_scan import inputs as scan
from memlm.cuda.linear_recurrence import inputs as recurrence
from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.short_convolution import inputs as convolution

ROWS, TOKENS = 2, 4096
LONGER = {"rows": 3, "tokens": 4999}  # what must need no binary of its own
KEY_VALUE_SIZES = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
# Kernels whose products have 64 rows (a chunk) or more, in 16-bit types.
RECURRENCE_PRODUCTS = frozenset(
    {"prepare_kernel", "scan_kernel", "reverse_scan_kernel", "gradient_kernel"}
)
LINEAR_PRODUCTS = frozenset(f"linear_{name}" for name in RECURRENCE_PRODUCTS)


def quick() -> list[Specimen]:
    """One configuration per kernel."""
    return [
        _recurrence(Recurrence(128, 128)),
        _recurrence(Recurrence(128, 128, tokens=1)),
        _convolution(Convolution(128, 128)),
        _scan(Scan(1024)),
        _linear_memory(LinearMemory(64)),
        _mlp_memory(MLPMemory(32, 128, 16)),
        *specimens_linear_cross_entropy.quick(),
        *specimens_product_key.quick(),
        *specimens_topk_search.quick(),
        *specimens_weighted_bag.quick(),
    ]


def full() -> list[Specimen]:
    """Every size, type and switch."""
    convolutions = map(_convolution, _convolution_matrix())
    scans = map(_scan, _scan_matrix())
    memories = map(_linear_memory, _linear_memory_matrix())
    deep = map(_mlp_memory, _mlp_memory_matrix())
    recurrences = map(_recurrence, _recurrence_matrix())
    tables = [*specimens_product_key.full(), *specimens_weighted_bag.full()]
    searches = specimens_topk_search.full()
    losses = specimens_linear_cross_entropy.full()
    others = [*scans, *memories, *deep, *tables, *searches, *losses]
    return [*quick(), *recurrences, *convolutions, *others]


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
    rows: int = ROWS
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
        H, B = 4, 1 if self.packed else self.rows
        HV, T = H * self.groups, self.tokens
        decay_shape = {"none": None, "constant": (HV,)}.get(self.decay, (B, T, HV))
        gate = self.decay == "gate"
        rows = self.rows
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
        from memlm.cuda.linear_recurrence import triton_implementation as launchers

        inputs = self.inputs()
        with mock.patch.object(launchers, "segments", lambda _: self.segments):
            if self.tokens == 1:
                launchers.forward(inputs, False, False)
                return
            o, state, _, saved = launchers.forward(inputs, True, True)
            launchers.backward(inputs, saved, o, state)


def _recurrence(case: Recurrence) -> Specimen:
    products = min(case.K, case.V) >= 64
    return Specimen(
        case.name,
        case.launch,
        _longer(case),
        RECURRENCE_PRODUCTS if products else frozenset(),
    )


def _longer(
    case: "Recurrence | Convolution | Scan | LinearMemory | MLPMemory",
) -> Callable[[], object]:
    """The same launches for other lengths; single tokens stay single."""
    changes = LONGER if case.tokens > 1 else {"rows": LONGER["rows"]}
    return dataclasses.replace(case, **changes).launch


def _recurrence_matrix() -> list[Recurrence]:
    cases = [
        Recurrence(K, V, groups=groups, tokens=tokens)
        for (K, V), groups, tokens in itertools.product(KEY_VALUE_SIZES, (1, 4), (TOKENS, 1))
    ]
    wide = functools.partial(Recurrence, 128, 256)
    cases += [wide(torch.float16)]
    cases += [wide(groups=4, packed=True)]
    cases += [wide(segments=4, packed=packed) for packed in (False, True)]
    cases += [
        wide(delta=delta, decay=decay, packed=packed)
        for delta, decay, packed in itertools.product(
            (True, False), ("none", "constant", "scalar", "gate"), (False, True)
        )
    ]
    # Sizes that fill no power of two: Olmo-Hybrid's, and a small model's.
    cases += [Recurrence(96, 192), Recurrence(24, 48)]
    # Linear attention: values with a column of ones.
    cases += [Recurrence(64, 65, delta=False, decay="none")]
    return cases


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One configuration of `memlm.cuda.short_convolution`: before K and V wide heads."""

    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    width: int = 4
    split: bool = True
    packed: bool = False
    rows: int = ROWS
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        words = [
            f"short_convolution {self.K}/{self.V} {str(self.dtype).removeprefix('torch.')}",
            f"width {self.width}",
            "" if self.split else "no split",
            "packed" if self.packed else "",
            "step" if self.tokens == 1 else "",
        ]
        return " ".join(word for word in words if word)

    def inputs(self) -> convolution.Inputs:
        H, B = 4, 1 if self.packed else self.rows
        D = H * (2 * self.K + self.V)
        parts = (
            convolution.Part(H, self.K, True),
            convolution.Part(H, self.K, True),
            convolution.Part(H, self.V, False),
        )
        return convolution.Inputs(
            x=_empty(B, self.tokens, D, dtype=self.dtype),
            weight=_empty(D, 1, self.width, dtype=self.dtype),
            tail=_empty(self.rows, self.width - 1, D, dtype=self.dtype),
            cu_seqlens=_empty(self.rows + 1, dtype=torch.int64) if self.packed else None,
            silu=True,
            parts=parts if self.split else (convolution.Part(1, D, False),),
        )

    def launch(self) -> None:
        from memlm.cuda.short_convolution import triton_kernels as launchers

        inputs = self.inputs()
        parts, new_tail = launchers.forward(inputs)
        if self.tokens > 1:
            launchers.backward(inputs, parts, new_tail)


def _convolution(case: Convolution) -> Specimen:
    return Specimen(case.name, case.launch, _longer(case))


def _convolution_matrix() -> list[Convolution]:
    dtypes = (torch.bfloat16, torch.float32)
    cases = [
        Convolution(K, V, dtype) for (K, V), dtype in itertools.product(KEY_VALUE_SIZES, dtypes)
    ]
    wide = functools.partial(Convolution, 128, 256)
    cases += [wide(torch.float16), wide(torch.float64)]
    cases += [wide(width=width) for width in (2, 3, 8)]
    cases += [wide(packed=True), wide(split=False), wide(tokens=1), Convolution(96, 192)]
    return cases


@dataclasses.dataclass(frozen=True)
class Scan:
    """One configuration of `memlm.cuda.diagonal_scan`: b in `dtype`, a at least float32."""

    D: int
    dtype: torch.dtype = torch.bfloat16
    narrow: bool = False
    packed: bool = False
    rows: int = ROWS
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        words = [
            f"diagonal_scan {self.D} {str(self.dtype).removeprefix('torch.')}",
            "narrow a" if self.narrow else "",
            "packed" if self.packed else "",
            "step" if self.tokens == 1 else "",
        ]
        return " ".join(word for word in words if word)

    def inputs(self) -> scan.Inputs:
        shape = (1 if self.packed else self.rows, self.tokens, self.D)
        wide = torch.promote_types(self.dtype, torch.float32)
        return scan.Inputs(
            a=_empty(*shape, dtype=self.dtype if self.narrow else wide),
            b=_empty(*shape, dtype=self.dtype),
            initial_state=_empty(self.rows, self.D, dtype=wide),
            cu_seqlens=_empty(self.rows + 1, dtype=torch.int64) if self.packed else None,
        )

    def launch(self) -> None:
        from memlm.cuda.diagonal_scan import triton_kernels as launchers

        inputs = self.inputs()
        h, state = launchers.forward(inputs)
        if self.tokens > 1:
            launchers.backward(inputs, h, h, state)


def _scan(case: Scan) -> Specimen:
    return Specimen(case.name, case.launch, _longer(case))


def _scan_matrix() -> list[Scan]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    cases = [Scan(D, dtype) for D, dtype in itertools.product((1024, 1536), dtypes)][1:]
    wide = functools.partial(Scan, 1024)
    cases += [wide(packed=True), wide(tokens=1), wide(narrow=True), wide(packed=True, tokens=1)]
    # Channels that fill a card without a split, and such that fill no block.
    return [*cases, Scan(1 << 16), Scan(40)]


@dataclasses.dataclass(frozen=True)
class LinearMemory:
    """The linear neural memory in tiles of C tokens; every: steps between refreshes, None exact."""

    D: int
    C: int = 64
    every: int | None = 1
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False
    rows: int = ROWS
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        words = [
            f"neural_memory linear {self.D} {str(self.dtype).removeprefix('torch.')}",
            f"tiles of {self.C}",
            "exact" if self.every is None else f"refresh every {self.every}",
            "ragged" if self.ragged else "",
        ]
        return " ".join(word for word in words if word)

    def launch(self) -> None:
        from memlm.cuda.neural_memory import triton_linear as launchers

        counts = [self.rows] * -(-self.tokens // self.C) + [1] * self.ragged
        M, C, D, exact = sum(counts), self.C, self.D, self.every is None
        q, k, v = (_empty(M, C, D, dtype=self.dtype) for _ in range(3))
        gates = TileGates(
            _empty(M, C, C), *(_empty(M, C) for _ in range(4)), *(_empty(M) for _ in range(3))
        )
        anchor, weights, momentum = (_empty(self.rows, D, D) for _ in range(3))
        anchor = None if exact else anchor
        options = (counts, self.every or 0, exact)
        o, *ends, saved = launchers.forward(
            q, k, v, gates, anchor, weights, momentum, *options, True
        )
        launchers.backward(q, k, v, gates, anchor, *options, saved, o, *ends)


def _linear_memory(case: LinearMemory) -> Specimen:
    products = case.C == 64 and case.D >= 64
    return Specimen(
        case.name, case.launch, _longer(case), LINEAR_PRODUCTS if products else frozenset()
    )


def _linear_memory_matrix() -> list[LinearMemory]:
    widths = (32, 64, 128, 256)
    sizes = itertools.product(widths, (16, 64), (None, 1))
    cases = [LinearMemory(*size) for size in sizes if size != (64, 64, 1)]
    return [
        *cases,
        *(LinearMemory(D, every=0) for D in widths),
        LinearMemory(64, 32),
        LinearMemory(96),
        LinearMemory(128, dtype=torch.float16),
        LinearMemory(128, every=None, ragged=True),
        LinearMemory(128, every=4, ragged=True),
    ]


@dataclasses.dataclass(frozen=True)
class MLPMemory:
    """The neural memory of two layers in tiles of C tokens; every: steps between refreshes."""

    D: int
    hidden: int
    C: int
    every: int = 1
    dtype: torch.dtype = torch.bfloat16
    rows: int = ROWS
    tokens: int = 512

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.D}/{self.hidden} {dtype} tiles of {self.C}"
        return f"neural_memory mlp {sizes} refresh every {self.every}"

    def launch(self) -> None:
        from memlm.cuda.neural_memory import triton_mlp as launchers

        counts = [self.rows] * -(-self.tokens // self.C)
        M, C, D = sum(counts), self.C, self.D
        q, k, v = (_empty(M, C, D, dtype=self.dtype) for _ in range(3))
        if launchers.longest_tile(q.device) < self.C:  # older cards take short tiles only
            return
        gates = TileGates(
            _empty(M, C, C), *(_empty(M, C) for _ in range(4)), *(_empty(M) for _ in range(3))
        )
        layers = (_empty(self.rows, D, self.hidden), _empty(self.rows, self.hidden, D))
        options = (counts, self.every)
        o, *ends, saved = launchers.forward(q, k, v, gates, layers, layers, layers, *options, True)
        launchers.backward(q, k, v, gates, *options, saved, o, *ends)


def _mlp_memory(case: MLPMemory) -> Specimen:
    return Specimen(case.name, case.launch, _longer(case))


def _mlp_memory_matrix() -> list[MLPMemory]:
    sizes = ((64, 64), (64, 128), (64, 256))
    cases = [MLPMemory(*size, C) for size, C in itertools.product(sizes, (16, 64))]
    wide = functools.partial(MLPMemory, 64, 256)
    return [*cases, MLPMemory(32, 128, 64), wide(32), wide(64, 0), wide(64, dtype=torch.float16)]
