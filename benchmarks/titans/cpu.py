"""One thread of the CPU: forward and backward, memory, forward alone, single tokens, streaming."""

import statistics
from typing import Any

import torch

from benchmarks import report
from benchmarks.library import Ratio, describe, one_thread, ratio, time_interleaved
from benchmarks.titans import measure
from benchmarks.titans.measure import OURS, PEER
from benchmarks.titans.problem import Problem

SIZES = ((128, 16), (128, 64), (256, 16), (256, 64))  # channels, chunk
LENGTHS = (1024, 2048, 4096)
FEEDS = ([96], [32, 64], [1] * 96, [40, 56], [7, 16, 3, 20, 1, 1, 48])
MEGABYTE = 1e6


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether both compute the same function."""
    sizes = ((32, 8),) if quick else SIZES
    lengths = (64, 128, 256) if quick else LENGTHS
    with one_thread():
        rows = [row for size in sizes for row in _training(*size, lengths, repeats)]
        _print_training(rows, lengths)
        agree = all(measure.agrees(row["differences"]) for row in rows if "differences" in row)
        print(f"\n{'The functions agree' if agree else 'THE FUNCTIONS DISAGREE'}", end="")
        print(f" within {measure.TOLERANCE} of the largest entries")
        found = {
            "machine": report.machine(),
            "training": rows,
            "forward": _forward(sizes, lengths[1], repeats),
            "decoding": _decoding(sizes, repeats),
            "streaming": _streaming(),
        }
    return found, agree


def _training(
    channels: int, chunk: int, lengths: tuple[int, ...], repeats: int
) -> list[dict[str, Any]]:
    """Forward and backward at each length; titans-pytorch not at the longest."""
    problems = [Problem(channels, chunk, T) for T in lengths]
    compared = problems[:-1]
    keys = [(OURS, p) for p in problems] + [(PEER, p) for p in compared]
    runs = {f"{name}, {p}": measure.run_of(p, name) for name, p in keys}
    times = time_interleaved(runs, "cpu", repeats)
    runs.clear()
    rows = []
    for problem in problems:
        row: dict[str, Any] = {"channels": channels, "chunk": chunk, "T": problem.T}
        for name in (PEER, OURS) if problem in compared else (OURS,):
            row[name] = {
                "seconds": times[f"{name}, {problem}"],
                "peak_bytes": measure.peak_memory(problem, name),
            }
        if problem in compared:
            row["faster"] = _over(row[PEER]["seconds"], row[OURS]["seconds"])
            row["smaller"] = row[PEER]["peak_bytes"] / row[OURS]["peak_bytes"]
            row["differences"] = measure.differences(problem)
        first = rows[0] if rows else row
        row["slower_than_first"] = _over(row[OURS]["seconds"], first[OURS]["seconds"])
        row["larger_than_first"] = row[OURS]["peak_bytes"] / first[OURS]["peak_bytes"]
        rows.append(row)
    return rows


def _print_training(rows: list[dict[str, Any]], lengths: tuple[int, ...]) -> None:
    header = ("d", "c", "T", f"{PEER} ms", f"{OURS} ms", "faster", f"{PEER} MB", f"{OURS} MB")
    header += ("smaller", "|o| up to", "o", "d input", "d parameters", "worst")
    shown = []
    for row in rows:
        cells = [row["channels"], row["chunk"], row["T"]]
        cells += [
            _milliseconds(row[name]["seconds"]) if name in row else None for name in (PEER, OURS)
        ]
        cells += [row.get("faster")]
        cells += [
            row[name]["peak_bytes"] / MEGABYTE if name in row else None for name in (PEER, OURS)
        ]
        cells += [row.get("smaller")]
        off = row.get("differences", {})
        cells += [off.get("largest output")]
        cells += [off.get(name) for name in measure.TOLERANCE]
        shown.append([*cells, off.get("worst parameter")])
    print("\nForward and backward, B=1, 1 head, depth 2, expansion 4, float32, 1 thread;")
    print("median (quartiles) of processor time; peak memory above model and inputs;")
    print("differences over the largest entry")
    print(report.table(header, shown))
    print(f"\n{OURS} over its own T={lengths[0]}: linear is {[T // lengths[0] for T in lengths]}")
    shown = [
        [
            row["channels"],
            row["chunk"],
            row["T"],
            row["slower_than_first"],
            row["larger_than_first"],
        ]
        for row in rows
    ]
    print(report.table(("d", "c", "T", "time", "memory"), shown))


def _over(times: list[float] | str, base: list[float] | str) -> Ratio | None:
    """None where one of them could not run."""
    return None if isinstance(times, str) or isinstance(base, str) else ratio(times, base)


def _milliseconds(samples: list[float] | str, calls: int = 1) -> float | str:
    """Of the median sample, per call of those that a sample consists of."""
    return samples if isinstance(samples, str) else 1000 * statistics.median(samples) / calls


def _forward(sizes: tuple, T: int, repeats: int) -> list[dict[str, Any]]:
    """Forward without graph."""
    rows = []
    for channels, chunk in sizes:
        problem = Problem(channels, chunk, T)
        runs = {name: measure.run_of(problem, name, backward=False) for name in (PEER, OURS)}
        times = time_interleaved(runs, "cpu", repeats)
        rows.append({"channels": channels, "chunk": chunk, "T": T, "seconds": times})
        rows[-1]["faster"] = _over(times[PEER], times[OURS])
    print("\nForward alone, without graph")
    _print_times(rows)
    return rows


def _decoding(sizes: tuple, repeats: int) -> list[dict[str, Any]]:
    """Single-token calls over a whole chunk, whose end updates the memory; each by its state."""
    rows = []
    for channels, chunk in sizes:
        problem = Problem(channels, chunk, 3 * chunk)
        x = problem.inputs().detach()
        with torch.no_grad():
            runs = {}
            for name, memory in measure.memories(problem).items():
                _, state = memory(x[:, : 2 * chunk])
                arguments = (memory, x[:, 2 * chunk :], [1] * chunk, state)
                runs[name] = lambda _, arguments=arguments: measure.feed(*arguments)
            times = time_interleaved(runs, "cpu", repeats)
        rows.append({"channels": channels, "chunk": chunk, "T": 1, "seconds": times})
        rows[-1]["calls"] = chunk
        rows[-1]["faster"] = _over(times[PEER], times[OURS])
    print("\nOne token per call, mean over a chunk")
    _print_times(rows)
    return rows


def _print_times(rows: list[dict[str, Any]]) -> None:
    shown = [
        [
            *(row[name] for name in ("channels", "chunk", "T")),
            *(_milliseconds(row["seconds"][name], row.get("calls", 1)) for name in (PEER, OURS)),
            row["faster"],
        ]
        for row in rows
    ]
    print(report.table(("d", "c", "T", f"{PEER} ms", f"{OURS} ms", "faster"), shown))


def _streaming() -> list[dict[str, Any]]:
    """A sequence in several calls against the same in one, float64."""
    problem = Problem(64, 16, 96, dtype=torch.float64)
    x = problem.inputs().detach()
    both = measure.memories(problem)
    rows = []
    for lengths in FEEDS:
        row: dict[str, Any] = {"lengths": lengths}
        for name, memory in both.items():
            try:
                with torch.no_grad():
                    fed = measure.feed(memory, x, lengths)
                    row[name] = float((fed - memory(x)[0]).abs().max())
            except Exception as failure:  # what cannot be fed is a cell of the table
                row[name] = describe(failure)
        rows.append(row)
    print(f"\nTokens in several calls, largest difference from one call, {problem}, float64")
    shown = [[feed_name(row["lengths"]), row[PEER], row[OURS]] for row in rows]
    print(report.table(("calls of", PEER, OURS), shown))
    return rows


def feed_name(lengths: list[int]) -> str:
    """The lengths of the calls, many single tokens by their number."""
    single = len(lengths) > 1 and set(lengths) == {1}
    return f"{len(lengths)} single tokens" if single else str(lengths)
