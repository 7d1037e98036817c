"""Exact search against faiss IndexFlatIP, and the engines against each other."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.library import ratio
from benchmarks.retrieval import measure
from benchmarks.retrieval.measure import NAMES, OURS, PEER
from benchmarks.retrieval.problem import Problem
from memlm.retrieval import create_engine

WIDTHS = (64, 256)
STORED = (16_384, 65_536, 262_144)
ENGINES = ("exact", "faiss_flat", "faiss_ivf", "faiss_hnsw")
BATCH = 512  # rows that are added at a time to what is there
MEGABYTE = 1e6
FASTER, MEGABYTES = 1.5, 64  # what C++ has to reach, in processor time on one thread


def run(repeats: int, quick: bool) -> tuple[dict[str, Any], bool]:
    """Print the tables; all results, and whether all find the same."""
    problems = [Problem(stored, width) for width in WIDTHS for stored in STORED]
    if quick:
        problems = [Problem(2000, 16, 40, 8)]
    exact, engines = [], []
    with measure.one_thread():
        machine = report.machine()
        for problem in problems:
            queries, keys = problem.vectors()
            exact += _exact(problem, queries, keys, repeats)
            engines += _engines(problem, queries, keys, repeats)
            print(".", end="", flush=True)
    _print_exact(exact)
    _print_engines(engines)
    agree = all(row["agreement"].within_rounding for row in exact if "agreement" in row)
    verdict = "All find the same" if agree else "RESULTS DIFFER"
    print(f"\n{verdict}; scores equal within {measure.ROUNDING} may change places")
    return {"machine": machine, "exact": exact, "engines": engines}, agree


def _exact(problem: Problem, queries: Tensor, keys: Tensor, repeats: int) -> list[dict[str, Any]]:
    searches = {name: measure.search_of(problem, name, queries, keys) for name in NAMES}
    found = {name: search() for name, search in searches.items()}
    times = measure.time_in_turns(searches, repeats)
    searches.clear()
    rows = []
    for name in NAMES:
        row: dict[str, Any] = {"problem": problem, "name": name, "seconds": times[name]}
        row["peak_bytes"] = measure.peak_memory(problem, name)
        if name != PEER:
            row["faster"] = ratio(times[PEER].processor, times[name].processor)
            row["faster_wall"] = ratio(times[PEER].wall, times[name].wall)
            row["recall"] = measure.recall(found[name], found[PEER])
            if OURS[name].dtype == torch.float32:
                row["agreement"] = measure.agreement(queries, keys, found[name], found[PEER])
        rows.append(row)
    return rows


def _print_exact(rows: list[dict[str, Any]]) -> None:
    one = rows[0]["problem"]
    print(
        f"\n\nExact search: {one.queries} queries, k={one.k}, inner product, 1 thread; medians, ",
        end="",
    )
    print(f"and peak\nmemory of the search alone. faster: than {PEER}")
    header = ("entries", "d", "search", "processor ms", "faster", "wall ms", "faster, wall")
    header += ("same indices", "same lists", "recall", "peak MB")
    shown = []
    for row in rows:
        same = row.get("agreement")
        processor, wall = row["seconds"].milliseconds
        shown.append(
            [
                *(row["problem"].stored, row["problem"].width, row["name"]),
                *(processor, row.get("faster"), wall, row.get("faster_wall")),
                *(same and same.indices, same and same.lists, row.get("recall")),
                row["peak_bytes"] / MEGABYTE,
            ]
        )
    print(report.table(header, shown))
    ours = [row for row in rows if row["name"] == next(iter(OURS))]
    least = min(row["faster"].median for row in ours)
    most = max(row["peak_bytes"] for row in ours) / MEGABYTE
    print(f"\n{ours[0]['name']}: at least {least:.2f}x (wanted: {FASTER}), ", end="")
    print(f"at most {most:.1f} MB (wanted: {MEGABYTES})")


def _engines(problem: Problem, queries: Tensor, keys: Tensor, repeats: int) -> list[dict[str, Any]]:
    expected = measure.search_of(problem, PEER, queries, keys)()
    built, rows = {}, []
    for name in ENGINES:
        start = time.process_time()
        engine = built[name] = create_engine(name, problem.width)
        engine.add(keys, torch.arange(problem.stored))
        row: dict[str, Any] = {"problem": problem, "name": name}
        row["build_seconds"] = time.process_time() - start
        row["recall"] = measure.recall(engine.search(queries, problem.k)[1], expected)
        rows.append(row)
    runs = {
        name: lambda engine=engine: engine.search(queries, problem.k)
        for name, engine in built.items()
    }
    times = measure.time_in_turns(runs, repeats)
    more = Problem(BATCH, problem.width).vectors(seed=1)[1]
    for row in rows:
        row["seconds"] = times[row["name"]]
        row["rows_per_second"] = _add_rate(built[row["name"]], more)
    return rows


def _add_rate(engine: Any, rows: Tensor) -> float:
    """Rows per second of processor time, added `BATCH` at a time to a store of that size."""
    seconds = []
    for _ in range(3):
        ids = torch.arange(len(rows)) + int(engine.ids[-1]) + 1
        start = time.process_time()
        engine.add(rows, ids)
        seconds.append(time.process_time() - start)
    return len(rows) / statistics.median(seconds)


def _print_engines(rows: list[dict[str, Any]]) -> None:
    one = rows[0]["problem"]
    print(f"\nEngines with their default settings: {one.queries} queries, k={one.k}, 1 thread,")
    print(f"processor time; rows are added {BATCH} at a time to a store of this size")
    header = ("entries", "d", "engine", "build s", "rows/s added", "search ms", "recall")
    shown = [
        [
            *(row["problem"].stored, row["problem"].width, row["name"], row["build_seconds"]),
            *(row["rows_per_second"], row["seconds"].milliseconds[0], row["recall"]),
        ]
        for row in rows
    ]
    print(report.table(header, shown))
