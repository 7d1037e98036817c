"""One thread of the CPU: whole steps, their memory, and the update of the table by itself."""

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.library import Run, one_thread, ratio, time_interleaved
from benchmarks.product_key import measure
from benchmarks.product_key.measure import NAMES, OURS, PEER, RATE
from benchmarks.product_key.problem import Problem, kernels
from memlm.cuda import Reads, product_key_select
from memlm.memory import ValueTable
from memlm.training.row_optimizer import RowOptimizer

SIZES = (256, 512)  # half keys in each half
MEGABYTE = 1e6
SPARSE = "torch.optim.SparseAdam"
# By the gradient each row takes: as the sparse tensor has it, and as the backward pass leaves it.
UPDATES = ("memlm, same gradient", "memlm, gradient as reads")


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether all compute the same function."""
    problems = [Problem(16, 32, 2, 4, 64)] if quick else [Problem(n) for n in SIZES]
    with one_thread():
        rows = [row for problem in problems for row in _steps(problem, repeats)]
        _print_steps(problems[0], rows)
        updates = [row for problem in problems for row in _updates(problem, repeats)]
        _print_updates(updates)
        agree = all(measure.agrees(row["differences"]) for row in rows if "differences" in row)
        print(f"\n{'The layers agree' if agree else 'THE LAYERS DISAGREE'}", end="")
        print(f" within {measure.TOLERANCE} of the largest entries")
        return {"machine": report.machine(), "steps": rows, "updates": updates}, agree


def _steps(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    runs = {name: measure.step_of(problem, name) for name in NAMES}
    times = time_interleaved(runs, "cpu", repeats)
    runs.clear()
    rows = []
    for name in NAMES:
        row: dict[str, Any] = {"problem": problem, "name": name, "seconds": times[name]}
        row["peak_bytes"] = measure.in_another_process(measure.resident_in_all, problem, name)
        row["step_bytes"] = measure.peak_memory(problem, name)
        if name in OURS and not isinstance(times[name], str):
            row["faster"] = ratio(times[PEER], times[name])
            row["smaller"] = rows[0]["peak_bytes"] / row["peak_bytes"]
            row["differences"] = measure.differences(problem, name)
        rows.append(row)
    return rows


def _print_steps(problem: Problem, rows: list[dict[str, Any]]) -> None:
    print(f"\nA step of a layer: forward, backward, update of all parameters; d={problem.d},")
    print(
        f"H={problem.heads}, k={problem.k}, T={problem.T}, float32, 1 thread; median of processor"
    )
    print("time; peak memory of layer, optimizers and step, and of a step above the others")
    header = ("slots", "layer, optimizer of the table", "ms", "faster", "peak MB", "smaller")
    header += ("of a step MB", "largest difference")
    shown = [
        [
            str(row["problem"]),
            row["name"],
            _milliseconds(row["seconds"]),
            row.get("faster"),
            row["peak_bytes"] / MEGABYTE,
            row.get("smaller"),
            row["step_bytes"] / MEGABYTE,
            max(row["differences"].values()) if "differences" in row else None,
        ]
        for row in rows
    ]
    print(report.table(header, shown))


def _gradient(problem: Problem) -> tuple[Tensor, Reads]:
    """A table's gradient as a backward pass leaves it, as a sparse tensor and as reads."""
    layer, _ = measure.build(problem, "memlm torch, fused Adam")
    x, dout = problem.inputs()
    with torch.no_grad():
        query = layer.norm(layer.to_queries(x[0]).view(problem.T, problem.heads, 2, -1))
        indices, weights = product_key_select(query, layer.keys, problem.k)
    indices, weights = indices.flatten(1), weights.flatten(1)
    entries = (weights[..., None] * dout[0, :, None]).flatten(0, 1)
    shape = (problem.n**2, problem.d)
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = torch.sparse_coo_tensor(indices.flatten()[None].long(), entries, shape)
    return sparse, Reads(indices, weights, dout[0])


def _updates(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """The table's step alone, on the gradient of all reads, rows repeated as they were read."""
    sparse, reads = _gradient(problem)
    same = Reads.of_rows(sparse._indices()[0].int(), sparse._values())
    weight = torch.nn.Parameter(torch.zeros(sparse.shape))
    optimizer = torch.optim.SparseAdam([weight], RATE)

    def step(_: int) -> None:
        weight.grad = sparse
        optimizer.step()

    runs: dict[str, Run] = {SPARSE: step}
    for method in ("lazy_adam", "rowwise_adagrad"):
        for kind, given in zip(UPDATES, (same, reads), strict=True):
            for implementation in ("native", "eager"):
                name = f"{kind}, {method}, {implementation}"
                runs[name] = _row_step(problem, method, given, implementation)
    times = time_interleaved(runs, "cpu", repeats)
    rows = [{"problem": problem, "name": name, "seconds": found} for name, found in times.items()]
    for row in rows[1:]:
        if not isinstance(row["seconds"], str):
            row["faster"] = ratio(times[SPARSE], row["seconds"])
    return rows


def _row_step(problem: Problem, method: str, given: Reads, implementation: str) -> Run:
    table = ValueTable(problem.n**2, problem.d)
    optimizer = RowOptimizer([table], RATE, method)

    def step(_: int) -> None:
        with kernels(implementation):
            table.pending.reads = [given]
            optimizer.step()

    return step


def _print_updates(rows: list[dict[str, Any]]) -> None:
    print(f"\nThe update of the table alone, against {SPARSE} on the same uncoalesced gradient")
    shown = [
        [str(row["problem"]), row["name"], _milliseconds(row["seconds"]), row.get("faster")]
        for row in rows
    ]
    print(report.table(("slots", "optimizer", "ms", "faster"), shown))


def _milliseconds(samples: list[float] | str) -> float | str:
    return samples if isinstance(samples, str) else 1000 * statistics.median(samples)
