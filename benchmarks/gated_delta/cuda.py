"""One GPU: against flash-linear-attention, FlashQLA and plain torch."""

import itertools
import time
from typing import Any

import torch

from benchmarks import report
from benchmarks.gated_delta import measure, peers
from benchmarks.gated_delta.decoding import decode
from benchmarks.gated_delta.peers import Peer
from benchmarks.gated_delta.problem import INPUTS, Problem
from benchmarks.library import (
    Run,
    copy_ceiling,
    input_sets,
    matmul_ceiling,
    peak_memory,
    time_interleaved,
)

BASES = ("fla", "memlm eager")  # the first that runs is what ratios are taken over
SIZES = ((128, 128), (128, 256), (256, 256), (64, 128))
ROWS_AND_TOKENS = ((4, 8192), (16, 2048))
HEADS = ((16, 16), (4, 16))
SECONDS_PER_TABLE = 4.0  # of further rounds, once there are enough: slow peers get fewer


def run(repeats: int, quick: bool, seconds: float | None) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether outputs and gradients agree.

    seconds: after these no further size is begun; those left out are named.
    """
    return compare("cuda", _problems("cuda", quick), repeats, quick, seconds)


def _problems(device: str, quick: bool) -> list[Problem]:
    sizes = SIZES[:1] if quick else SIZES
    shapes = ((1, 256),) if quick else ROWS_AND_TOKENS
    heads = ((2, 2),) if quick else HEADS
    return [
        Problem(B, T, H, HV, K, V, torch.bfloat16, device)
        for (B, T), (K, V), (H, HV) in itertools.product(shapes, sizes, heads)
    ]


def compare(
    device: str, problems: list[Problem], repeats: int, quick: bool, seconds: float | None = None
) -> tuple[dict[str, Any], bool]:
    """As `run`, at these sizes."""
    start = time.perf_counter()
    everyone = [
        *peers.memlm_peers(device),
        peers.fla_peer(),
        peers.flash_qla_peer(),
        peers.transformers_peer(),
    ]
    copy = copy_ceiling(device, 1 << 20 if quick else None)
    matmul = matmul_ceiling(device, problems[0].dtype, 256 if quick else None)
    print(f"copy {copy / 1e12:.3f} TB/s, matmul {matmul / 1e12:.1f} TFLOP/s (measured here)")
    found: dict[str, Any] = {"copy_bytes_per_second": copy, "matmul_flops_per_second": matmul}
    found |= {"machine": report.machine()}
    found |= {"absent": measure.absent(everyone), "agreement": [], "sequences": [], "steps": []}
    agree = True
    for K, V, (H, HV) in dict.fromkeys((p.K, p.V, (p.H, p.HV)) for p in problems):
        checked = Problem(2, 200, H, HV, K, V, problems[0].dtype, device)
        rows, agrees = measure.agreement(checked, everyone)
        found["agreement"] += [{"problem": str(checked), **row} for row in rows]
        agree = agree and agrees
    left_out = []
    for problem in problems:
        if seconds is not None and time.perf_counter() - start > seconds:
            left_out.append(str(problem))
            continue
        found["sequences"] += _sequences(problem, everyone, repeats, copy, matmul)
    for K, V in dict.fromkeys((p.K, p.V) for p in problems):
        problem = Problem(32, 1, problems[0].HV, problems[0].HV, K, V, problems[0].dtype, device)
        found["steps"] += _steps(problem, everyone, repeats, copy)
    measure.print_absent(everyone)
    for text in left_out:
        print(f"not measured, time was up: {text}")
    sizes = problems[0]
    one_row = Problem(1, 1, sizes.H, sizes.HV, sizes.K, sizes.V, sizes.dtype, device)
    contexts = (64, 1024) if quick else (64, 65536)
    kernels = "memlm triton" in (peer.name for peer in measure.present(everyone, 1))
    found["decoding"] = decode(one_row, contexts, repeats, "triton" if kernels else "auto")
    return found | {"left_out": left_out}, agree


def _sequences(
    problem: Problem, everyone: list[Peer], repeats: int, copy: float, matmul: float
) -> list[dict[str, Any]]:
    """Forward and backward of whole sequences, one row per peer and pass."""
    sets = input_sets(problem.input_bytes, problem.device)
    inputs = [problem.tensors(seed) for seed in range(sets)]
    outputs = problem.output_gradients()
    present = measure.present(everyone, problem.T)
    passes = {
        "forward": (
            {peer.name: _forward(peer, inputs) for peer in present},
            problem.forward_bytes(),
            problem.forward_flops(),
        ),
        "backward": (
            {peer.name: _Backward(peer, inputs, outputs) for peer in present},
            problem.backward_bytes(),
            problem.backward_flops(),
        ),
    }
    rows = []
    for kind, (runs, size, flops) in passes.items():
        times = time_interleaved(runs, problem.device, repeats, SECONDS_PER_TABLE)
        base = next((name for name in BASES if isinstance(times.get(name), list)), "")
        for row in measure.compared(times, base):
            row |= {"pass": kind, "problem": str(problem)}
            if "seconds" in row:
                row["ns_per_token_head"] = 1e9 * row["seconds"] / problem.token_heads
                row["copy_percent"] = 100 * size / row["seconds"] / copy
                row["matmul_percent"] = 100 * flops / row["seconds"] / matmul
                row["peak_bytes"] = peak_memory(runs[row["peer"]], problem.device)
            rows.append(row)
        runs.clear()  # and with them the graphs they keep
    _print(f"\n{problem}, {problem.dtype}", rows)
    return rows


def _forward(peer: Peer, inputs: list[dict]) -> Run:
    """The forward pass as in training: it keeps what the backward pass needs."""
    return lambda i: peer.run(inputs[i % len(inputs)])


class _Backward:
    """The backward pass alone, over graphs that are built at the first call."""

    def __init__(self, peer: Peer, inputs: list[dict], outputs: tuple):
        self.peer, self.inputs, self.outputs = peer, inputs, outputs
        self.graphs: list[tuple] = []

    def __call__(self, i: int) -> object:
        if not self.graphs:
            self.graphs = [self.peer.run(tensors) for tensors in self.inputs]
        place = i % len(self.graphs)
        o, state = self.graphs[place]
        leaves = [self.inputs[place][name] for name in INPUTS]
        return torch.autograd.grad((o, state.float()), leaves, self.outputs, retain_graph=True)


def _steps(
    problem: Problem, everyone: list[Peer], repeats: int, copy: float
) -> list[dict[str, Any]]:
    """Single tokens of many rows."""
    sets = input_sets(problem.step_bytes(), problem.device)
    inputs = [problem.tensors(seed, grad=False) for seed in range(sets)]
    for tensors in inputs:
        tensors["initial_state"] = torch.randn(problem.state_shape, device=problem.device)

    def run_of(peer: Peer) -> Run:
        call = peer.function(1)
        return lambda i: call(inputs[i % sets])

    runs = {peer.name: run_of(peer) for peer in measure.present(everyone, 1)}
    with torch.no_grad():
        times = time_interleaved(runs, problem.device, repeats, SECONDS_PER_TABLE)
    base = next((name for name in BASES if isinstance(times.get(name), list)), "")
    rows = measure.compared(times, base)
    for row in rows:
        row |= {"pass": "step", "problem": str(problem)}
        if "seconds" in row:
            row["ns_per_token_head"] = 1e9 * row["seconds"] / problem.token_heads
            row["copy_percent"] = 100 * problem.step_bytes() / row["seconds"] / copy
    _print(f"\nOne token per row, {problem}, {problem.dtype}", rows)
    return rows


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    base = next((row["base"] for row in rows if "base" in row), "nothing")
    columns = {
        "peer": "peer",
        "pass": "pass",
        "milliseconds": "ms",
        "ratio": f"over {base}",
        "ns_per_token_head": "ns/token-head",
        "copy_percent": "% of copy",
        "matmul_percent": "% of matmul",
        "peak_gib": "peak GiB",
        "note": "note",
    }
    for row in rows:
        if "seconds" in row:
            row["milliseconds"] = 1000 * row["seconds"]
        if row.get("peak_bytes") is not None:
            row["peak_gib"] = row["peak_bytes"] / 2**30
    print(title)
    shown = [[row.get(name) for name in columns] for row in rows]
    print(report.table(list(columns.values()), shown))
