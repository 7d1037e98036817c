"""What the CPU and the GPU comparison share: agreement, times, ratios."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import report
from benchmarks.gated_delta import peers as peers_of
from benchmarks.gated_delta.peers import Peer
from benchmarks.gated_delta.problem import INPUTS, Problem
from benchmarks.library import Run, ratio

# Largest relative RMS error against float64 that counts as agreement.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def agreement(problem: Problem, peers: list[Peer]) -> tuple[list[dict[str, Any]], bool]:
    """Print every peer's errors; the rows, and whether all of memlm's own agree."""
    rows = []
    own = {peer.name for peer in present(peers, problem.T) if peer.name.startswith("memlm")}
    for name, found in peers_of.errors(problem, peers).items():
        if isinstance(found, str):
            rows.append({"peer": name, "verdict": found})
            continue
        # NaN is no agreement.
        agrees = all(error <= TOLERANCE[problem.dtype] for error in found.values())
        verdict = "agrees" if agrees else f"DISAGREES by more than {TOLERANCE[problem.dtype]:g}"
        rows.append({"peer": name, **found, "verdict": verdict})
    names = ("o", "state", *(f"d{name}" for name in INPUTS))
    print(f"\nRelative RMS error against float64, {problem}, {problem.dtype}")
    shown = [
        [row["peer"], *(row.get(name) and f"{row[name]:.1e}" for name in names), row["verdict"]]
        for row in rows
    ]
    print(report.table(("peer", *names, "verdict"), shown))
    return rows, all(row["verdict"] == "agrees" for row in rows if row["peer"] in own)


def runs(problem: Problem, peers: list[Peer], backward: bool, sets: int = 1) -> dict[str, Run]:
    """What to time, by peer: forward without graph, or forward and backward; absent ones left out.

    sets: different inputs to take in turn.
    """
    inputs = [problem.tensors(seed, grad=backward) for seed in range(sets)]
    outputs = problem.output_gradients()

    def run_of(peer: Peer) -> Run:
        call = peer.function(problem.T)
        if backward:
            return lambda i: peers_of.gradients(call, inputs[i % sets], outputs)

        def forward(i: int) -> object:
            with torch.no_grad():
                return call(inputs[i % sets])

        return forward

    return {peer.name: run_of(peer) for peer in present(peers, problem.T)}


def present(peers: list[Peer], tokens: int) -> list[Peer]:
    """The peers that can be called for sequences of this length."""
    return [peer for peer in peers if not isinstance(peer.function(tokens), str)]


def absent(peers: list[Peer]) -> dict[str, str]:
    """The reasons of the peers that cannot be called."""
    return {peer.name: peer.run for peer in peers if isinstance(peer.run, str)}


def print_absent(peers: list[Peer]) -> None:
    """One line per peer that cannot be called."""
    for name, reason in absent(peers).items():
        print(f"not compared: {name}: {reason}")


def compared(times: Mapping[str, list[float] | str], base: str) -> list[dict[str, Any]]:
    """One row per peer: median seconds, the ratio to `base`, or why there are none."""
    rows = []
    for name, samples in times.items():
        if isinstance(samples, str):
            rows.append({"peer": name, "note": samples})
            continue
        row = {"peer": name, "seconds": statistics.median(samples), "samples": samples}
        if isinstance(times.get(base), list):
            row |= {"ratio": ratio(samples, times[base]), "base": base}
        rows.append(row)
    return rows
