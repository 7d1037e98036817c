"""One GPU: training throughput of the fused memories and of large chunks, beside titans-pytorch.

Ours are the operations alone; titans-pytorch is its NeuralMemory of the same heads, which also
projects (its products are not counted). All in one call of forward and backward.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.library import matmul_ceiling, peak_memory, ratio, time_interleaved
from benchmarks.titans.measure import PEER
from memlm.cuda import (
    LargeChunkMemoryState,
    NeuralMemoryState,
    large_chunk_memory,
    neural_memory,
)

SECONDS_PER_TABLE = 20.0
Step = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Size:
    """B rows of T tokens, H heads of `channels`, chunks of `chunk` tokens."""

    B: int
    T: int
    H: int
    channels: int
    chunk: int
    device: str
    dtype: torch.dtype = torch.bfloat16
    expansion: int = 4

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} d={self.channels} c={self.chunk} {self.dtype}"

    @property
    def hidden(self) -> int:
        return self.expansion * self.channels

    @property
    def tokens(self) -> int:
        return self.B * self.T

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
        """Random numbers that want gradients."""
        x = scale * torch.randn(*shape, device=self.device)
        return x.to(dtype).requires_grad_()

    def tokens_of_heads(self) -> list[Tensor]:
        """Unit q and k, and v ``[B, T, H, channels]``."""
        shape = (self.B, self.T, self.H, self.channels)
        scales = (self.channels**-0.5, self.channels**-0.5, 1)
        return [self.normal(*shape, dtype=self.dtype, scale=scale) for scale in scales]


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results. Nothing is compared here but speed."""
    return compare("cuda", repeats, quick)


def compare(device: str, repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """As `run`, on any device."""
    small = Size(1, 64, 2, 16, 16, device) if quick else Size(8, 4096, 16, 64, 64, device)
    wide = dataclasses.replace(small, H=1, channels=32, chunk=32)
    if not quick:
        wide = dataclasses.replace(small, H=4, channels=256, chunk=2048, expansion=2)
    ceiling = matmul_ceiling(device, small.dtype, 256 if quick else None)
    print(f"matmul {ceiling / 1e12:.1f} TFLOP/s (measured here)\n{small}; large chunks: {wide}")
    runs: dict[str, tuple[Size, int, Callable[[], Step]]] = {
        PEER: (small, _mlp_flops(small), lambda: _peer(small, False)),
        f"{PEER}, autocast": (small, _mlp_flops(small), lambda: _peer(small, True)),
        "memlm linear": (small, _linear_flops(small), lambda: _memory(small, 1)),
        "memlm linear exact": (small, _linear_flops(small), lambda: _memory(small, 1, exact=True)),
        "memlm two layers": (small, _mlp_flops(small), lambda: _memory(small, 2)),
        "memlm large chunks": (wide, _large_flops(wide), lambda: _large(wide, False)),
        "memlm large chunks, orthogonal": (wide, _large_flops(wide), lambda: _large(wide, True)),
    }
    made: dict[str, Step] = {}
    absent = {}
    for name, (_, _, make) in runs.items():
        try:
            made[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    times = time_interleaved(made, device, repeats, SECONDS_PER_TABLE)
    rows = []
    for name, (size, flops, _) in runs.items():
        row: dict[str, Any] = {"implementation": name, "size": str(size)}
        found = times.get(name, absent.get(name))
        if isinstance(found, list):
            seconds = statistics.median(found)
            row |= {"seconds": found, "tokens_per_second": size.tokens / seconds}
            row["matmul_percent"] = 100 * flops / seconds / ceiling
            row["peak_bytes"] = peak_memory(made[name], device)
            if isinstance(times.get(PEER), list):
                row["faster"] = ratio(times[PEER], found)
        else:
            row["note"] = found
        rows.append(row)
    columns = ("implementation", "tokens_per_second", "faster", "matmul_percent", "peak_bytes")
    print(report.table((*columns, "note"), [[r.get(c) for c in (*columns, "note")] for r in rows]))
    results = {"machine": report.machine(), "matmul_flops_per_second": ceiling, "rows": rows}
    return results, True


def _memory(size: Size, depth: int, exact: bool = False) -> Step:
    """Forward and backward of `neural_memory`."""
    q, k, v = size.tokens_of_heads()
    gates = [size.normal(size.B, size.T, size.H) for _ in range(3)]
    widths = [size.channels, *[size.hidden] * (depth - 1), size.channels]
    layers = tuple(
        size.normal(size.B, size.H, *pair, scale=pair[0] ** -0.5)
        for pair in itertools.pairwise(widths)
    )
    momentum = tuple(torch.zeros_like(w) for w in layers)
    offset = torch.zeros(size.B, dtype=torch.int64, device=size.device)
    state = NeuralMemoryState(() if exact else layers, layers, momentum, offset)

    def step(_: int) -> object:
        alpha, eta, theta = (gate.sigmoid() for gate in gates)
        o, _ = neural_memory(
            q, k, v, 0.01 * alpha, eta, 0.02 * theta, state, size.chunk, exact=exact
        )
        return torch.autograd.grad(o, [q, k, v, *gates, *layers], torch.ones_like(o))

    return step


def _large(size: Size, orthogonalise: bool) -> Step:
    """Forward and backward of `large_chunk_memory`."""
    q, k, v = size.tokens_of_heads()
    steps = size.normal(size.B, size.T, size.H, 3)
    shapes = ((size.channels, 2 * size.hidden), (size.hidden, size.channels))
    weights = tuple(size.normal(size.B, size.H, *shape, scale=shape[0] ** -0.5) for shape in shapes)
    nothing = tuple(torch.zeros_like(w) for w in weights)
    sums = torch.zeros(size.B, size.H, device=size.device)
    offset = torch.zeros(size.B, dtype=torch.int64, device=size.device)
    state = LargeChunkMemoryState(weights, nothing, nothing, sums, offset)

    def step(_: int) -> object:
        sizes = 1e-3 * steps.sigmoid()
        o, _ = large_chunk_memory(q, k, v, sizes, None, state, size.chunk, orthogonalise)
        return torch.autograd.grad(o, [q, k, v, steps, *weights], torch.ones_like(o))

    return step


def _peer(size: Size, autocast: bool) -> Step:
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(
        size.H * size.channels,
        dim_head=size.channels,
        heads=size.H,
        chunk_size=size.chunk,
        default_model_kwargs={"depth": 2, "expansion_factor": float(size.expansion)},
    ).to(size.device)
    x = size.normal(size.B, size.T, size.H * size.channels)
    wanted = [x, *(p for p in memory.parameters() if p.requires_grad)]

    def step(_: int) -> object:
        with torch.autocast(torch.device(size.device).type, size.dtype, enabled=autocast):
            o, _ = memory(x)
        return torch.autograd.grad(o.float().sum(), wanted, allow_unused=True)

    return step


def _linear_flops(size: Size) -> int:
    """Of forward and backward: K A, the two updates, the two reads, the products in a chunk."""
    d, c = size.channels, size.chunk
    return 3 * size.tokens * size.H * (10 * d * d + 4 * c * d)


def _mlp_flops(size: Size) -> int:
    """Of forward and backward: 22 d h per token, and the products in a chunk."""
    d, h, c = size.channels, size.hidden, size.chunk
    return 3 * size.tokens * size.H * (22 * d * h + 4 * c * (d + h))


def _large_flops(size: Size) -> int:
    """Of forward and backward: 18 d h per token (reads, keys forward and backward, updates)."""
    return 3 * size.tokens * size.H * 18 * size.channels * size.hidden
