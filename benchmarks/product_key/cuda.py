"""One GPU: the gather of bags against a copy, selection and bag against torch's, and the table's
deterministic gradient against an atomic one."""

import dataclasses
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.library import Run, copy_ceiling, peak_memory, ratio, time_interleaved
from benchmarks.product_key.problem import Problem, kernels
from memlm.cuda import product_key_select, weighted_bag
from memlm.cuda.weighted_bag import Reads, implementation

SECONDS_PER_TABLE = 20.0
SIZE = Problem(1024, 1024, 4, 32, 32768)
COPY_PERCENT, FASTER, SLOWER = 85, 5, 1.3  # what the three tables have to reach
GATHERS = ("triton", "cuda", "eager")
TORCH, TORCH_FLOAT32 = "torch: top-k, embedding_bag", "the same, table in float32"
OURS = "memlm"
ATOMIC, DETERMINISTIC = "index_add_", "memlm, deterministic"
# Largest difference over the largest entry; numbers are bfloat16.
TOLERANCE = 2e-2


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether all compute the same."""
    return compare("cuda", Problem(16, 32, 2, 4, 64) if quick else SIZE, repeats)


def compare(device: str, problem: Problem, repeats: int) -> tuple[dict[str, Any], bool]:
    """As `run`, on any device."""
    given = Inputs.draw(problem, device)
    ceiling = copy_ceiling(device, None if device == "cuda" else 1 << 20)
    print(f"{problem}, d={problem.d}, H={problem.heads}, k={problem.k}, T={problem.T}, bfloat16")
    print(f"copy {ceiling / 1e9:.0f} GB/s (measured here, read and written)")
    results: dict[str, Any] = {"machine": report.machine(), "copy_bytes_per_second": ceiling}
    tables = {"gather": _gather(given), "layer": _layer(given), "gradient": _gradient(given)}
    for name, runs in tables.items():
        times = time_interleaved(runs, device, repeats, SECONDS_PER_TABLE)
        rows = [{"name": run, "seconds": found} for run, found in times.items()]
        for row in rows:
            if not isinstance(row["seconds"], str):
                row["peak_bytes"] = peak_memory(runs[row["name"]], device)
        results[name] = rows
    _judge(given, ceiling, results)
    outcomes = {name: _differences(runs) for name, runs in tables.items()}
    results["differences"] = outcomes
    agree = all(found <= TOLERANCE for one in outcomes.values() for found in one.values())
    print(f"\n{'All agree' if agree else 'THE RESULTS DISAGREE'}: {outcomes}")
    return results, agree


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of a layer without its projections; bfloat16, but for the weights of bags.

    Scores differ so much that the last of the chosen weighs nothing: that rounding may choose
    another is then no disagreement.
    """

    problem: Problem
    query: Tensor  # [T, H, 2, d / 2]
    keys: Tensor  # [H, 2, n, d / 2]
    values: Tensor  # [n * n, d]
    indices: Tensor  # int32 [T, H k], any rows
    weights: Tensor  # float32 [T, H k]
    dout: Tensor  # [T, d]

    @classmethod
    def draw(cls, problem: Problem, device: str) -> "Inputs":
        torch.manual_seed(0)
        n, d, H, T, bag = problem.n, problem.d, problem.heads, problem.T, problem.heads * problem.k

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        indices = torch.randint(n * n, (T, bag), device=device, dtype=torch.int32)
        weights = torch.rand(T, bag, device=device)
        query, keys = normal(T, H, 2, d // 2), normal(H, 2, n, d // 2)
        return cls(problem, query, keys, normal(n * n, d), indices, weights, normal(T, d))


def _gather(given: Inputs) -> dict[str, Run]:
    """The bag alone by each implementation."""

    def by(name: str) -> Run:
        def bag(_: int) -> Tensor:
            with torch.no_grad(), kernels(f"auto,weighted_bag={name}"):
                return weighted_bag(given.indices, given.weights, given.values)

        return bag

    return {name: by(name) for name in GATHERS}


def _layer(given: Inputs) -> dict[str, Run]:
    """Selection and bag, forward and backward: outputs and all gradients."""

    def ours(_: int) -> tuple[Tensor, ...]:
        query, keys, values = _leaves(given.query, given.keys, given.values)
        indices, weights = product_key_select(query, keys, given.problem.k)
        out = weighted_bag(indices.flatten(1), weights.flatten(1), values)
        return out.detach(), *torch.autograd.grad(out, [query, keys, values], given.dout)

    def torch_by(dtype: torch.dtype) -> Run:
        table = given.values.to(dtype)

        def step(_: int) -> tuple[Tensor, ...]:
            query, keys, values = _leaves(given.query, given.keys, table)
            indices, weights = _plain_selection(query, keys, given.problem)
            out = F.embedding_bag(indices, values, per_sample_weights=weights.to(dtype), mode="sum")
            dout = given.dout.to(dtype)
            return out.detach(), *torch.autograd.grad(out, [query, keys, values], dout)

        return step

    peers = {TORCH: torch_by(torch.bfloat16), TORCH_FLOAT32: torch_by(torch.float32)}
    return {**peers, OURS: ours}


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _plain_selection(query: Tensor, keys: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows [T, H k] and weights of the best pairs among all k * k."""
    k = problem.k
    scores = torch.einsum("thsc,hsnc->thsn", query.float(), keys.float())
    best, rows = scores.topk(k)
    pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(-2)
    chosen, place = pairs.topk(k)
    rows = rows[:, :, 0].gather(-1, place // k) * problem.n + rows[:, :, 1].gather(-1, place % k)
    return rows.flatten(1), chosen.softmax(-1).flatten(1)


def _gradient(given: Inputs) -> dict[str, Run]:
    """The table's gradient [n * n, d] in float32."""
    rows, d = given.values.shape

    def atomic(_: int) -> Tensor:
        entries = given.weights[..., None] * given.dout[:, None]
        total = torch.zeros(rows, d, device=given.dout.device)
        return total.index_add_(0, given.indices.flatten(), entries.flatten(0, 1))

    def deterministic(_: int) -> Tensor:
        reads = Reads(given.indices, given.weights, given.dout)
        return implementation(given.values).dense_gradient([reads], rows)

    return {ATOMIC: atomic, DETERMINISTIC: deterministic}


def _judge(given: Inputs, ceiling: float, results: dict[str, Any]) -> None:
    """Add to the rows what they are judged by, and print them."""
    read = given.indices.numel() * given.values.shape[1] * given.values.element_size()
    written = given.dout.nbytes
    for row in results["gather"]:
        if not isinstance(row["seconds"], str):
            moved = (read + written) / statistics.median(row["seconds"])
            row["copy_percent"] = 100 * moved / ceiling
    layer = {row["name"]: row for row in results["layer"]}
    gradient = {row["name"]: row for row in results["gradient"]}
    for name in (TORCH, TORCH_FLOAT32):
        _relate(layer[OURS], layer[name], f"faster than {name}")
    _relate(gradient[ATOMIC], gradient[DETERMINISTIC], "slower", gradient[DETERMINISTIC])
    bars = {
        "gather": (f"at least {COPY_PERCENT} % of a copy", ("copy_percent",)),
        "layer": (
            f"at least {FASTER} times faster",
            (f"faster than {TORCH}", f"faster than {TORCH_FLOAT32}"),
        ),
        "gradient": (f"at most {SLOWER} times slower", ("slower",)),
    }
    for name, (bar, columns) in bars.items():
        print(f"\n{name}: the bar is {bar}")
        shown = [
            [row["name"], _milliseconds(row["seconds"]), row.get("peak_bytes")]
            + [row.get(column) for column in columns]
            for row in results[name]
        ]
        print(report.table(("implementation", "ms", "peak_bytes", *columns), shown))


def _relate(
    base: dict[str, Any], other: dict[str, Any], name: str, target: dict[str, Any] | None = None
) -> None:
    """How many times longer `other` takes than `base`, under `name` in `target`, else in `base`."""
    if not isinstance(base["seconds"], str) and not isinstance(other["seconds"], str):
        (base if target is None else target)[name] = ratio(other["seconds"], base["seconds"])


def _differences(runs: dict[str, Run]) -> dict[str, float]:
    """How far the results of the runs are from those of the last that works."""
    last: tuple[Tensor, ...] | None = None
    found = {}
    for name, one in reversed(runs.items()):
        try:
            result = one(0)
        except (RuntimeError, NotImplementedError):  # its row of the table says why
            continue
        result = result if isinstance(result, tuple) else (result,)
        if last is None:
            last = result
        else:
            pairs = zip(result, last, strict=True)
            found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return found


def _milliseconds(samples: list[float] | str) -> float | str:
    return samples if isinstance(samples, str) else 1000 * statistics.median(samples)
