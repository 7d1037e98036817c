"""One GPU: the fused search against a product of all queries and keys and torch's top-k."""

import dataclasses
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.library import Run, peak_memory, ratio, time_interleaved
from benchmarks.product_key.problem import kernels
from memlm.cuda import topk_search

OURS = "memlm"
TORCH, TORCH_FLOAT32 = "torch: product, top-k", "the same, float32 scores"
SECONDS_PER_TABLE = 3.0
FASTER, QUERIES, STORED = 2, 2048, 1 << 20  # what the search has to reach at these sizes
CHECKED = 64  # queries whose results are compared with those of float64
# Scores in float32 differ by this much from float64, relative to the largest.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Size:
    """Queries and keys of one store; the k best are found."""

    queries: int
    stored: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    k: int = 32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.queries} x {self.stored} x {self.width} {dtype}"

    @property
    def matrix_bytes(self) -> int:
        """Of all scores, in the type of the keys."""
        return self.queries * self.stored * self.dtype.itemsize

    def draw(self, device: str) -> tuple[Tensor, Tensor]:
        """Normal queries [queries, width] and keys [stored, width]."""
        torch.manual_seed(0)
        return tuple(
            torch.randn(count, self.width, device=device).to(self.dtype)
            for count in (self.queries, self.stored)
        )


SIZES = (
    *(Size(QUERIES, stored, width) for stored in (STORED, 1 << 18) for width in (64, 256)),
    *(Size(QUERIES, STORED, width, torch.float16) for width in (64, 256)),
    *(Size(1, STORED, width) for width in (64, 256)),
)


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether all are exact."""
    return compare("cuda", (Size(64, 4096, 64),) if quick else SIZES, repeats)


def compare(device: str, sizes: tuple[Size, ...], repeats: int) -> tuple[dict[str, Any], bool]:
    """As `run`, on any device."""
    rows = [row for size in sizes for row in _rows(size, device, repeats)]
    print(f"Searches of one store for the {sizes[0].k} best, in one call; the bar is {FASTER}")
    print(f"times faster with {QUERIES} queries and {STORED} keys, without a matrix of scores")
    header = ("queries x keys x channels", "search", "ms", "memlm faster", "peak MB", "scores MB")
    print(report.table(header, [_shown(row) for row in rows]))
    outcomes = {str(size): _error(size, device) for size in sizes}
    exact = all(error <= TOLERANCE for error in outcomes.values())
    print(f"\n{'All are exact' if exact else 'RESULTS ARE NOT EXACT'}: {outcomes}")
    return {"machine": report.machine(), "searches": rows, "errors": outcomes}, exact


def _rows(size: Size, device: str, repeats: int) -> list[dict[str, Any]]:
    queries, keys = size.draw(device)

    def ours(_: int) -> tuple[Tensor, Tensor]:
        with kernels("auto,topk_search=triton"):
            return topk_search(queries[None], keys[None], size.k)

    runs: dict[str, Run] = {
        TORCH: lambda _: (queries @ keys.T).topk(size.k),
        TORCH_FLOAT32: lambda _: torch.mm(queries, keys.T, out_dtype=torch.float32).topk(size.k),
        OURS: ours,
    }
    times = time_interleaved(runs, device, repeats, SECONDS_PER_TABLE)
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {"size": size, "name": name, "seconds": seconds}
        if not isinstance(seconds, str):
            row["peak_bytes"] = peak_memory(runs[name], device)
            if name != OURS and not isinstance(times[OURS], str):
                row["memlm faster"] = ratio(seconds, times[OURS])
        rows.append(row)
    return rows


def _error(size: Size, device: str) -> float:
    """How far our scores, and those of the keys we name, are from the best in float64.

    Relative to the best score of all; infinite where a key is named twice.
    """
    queries, keys = size.draw(device)
    with kernels("auto,topk_search=triton"):
        scores, indices = (found[0] for found in topk_search(queries[None], keys[None], size.k))
    rows = torch.arange(0, size.queries, max(1, size.queries // CHECKED), device=device)[:CHECKED]
    scores, indices = scores[rows].double(), indices[rows]
    if (indices.sort(-1).values.diff(dim=-1) <= 0).any():
        return float("inf")
    exact = torch.cat([queries[rows].double() @ part.double().T for part in keys.split(1 << 16)], 1)
    best = exact.topk(size.k).values
    errors = [(found - best).abs().max() for found in (scores, exact.gather(-1, indices))]
    return float(max(errors) / best.abs().max())


def _shown(row: dict[str, Any]) -> list[Any]:
    seconds, peak = row["seconds"], row.get("peak_bytes")
    return [
        str(row["size"]),
        row["name"],
        seconds if isinstance(seconds, str) else 1000 * statistics.median(seconds),
        row.get("memlm faster"),
        None if peak is None else peak / 1e6,
        row["size"].matrix_bytes / 1e6,
    ]
