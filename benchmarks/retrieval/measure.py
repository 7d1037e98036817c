"""Agreement with faiss, times, and memory of a search."""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import faiss
import torch
from torch import Tensor

from benchmarks import library
from benchmarks.library import Run, resident_growth
from benchmarks.product_key.problem import kernels
from benchmarks.retrieval.problem import Problem
from memlm.cuda import quantize_keys, topk_search

PEER = "faiss IndexFlatIP"
# Scores of unit vectors in float32 may be off by this much; indices may change places within it.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Ours in one form: the kernels, and the type of the keys."""

    kernels: str
    dtype: torch.dtype = torch.float32


OURS = {
    "memlm C++": Contestant("native"),
    "memlm C++, float16 keys": Contestant("native", torch.float16),
    "memlm C++, int8 keys": Contestant("native", torch.int8),
    "memlm torch": Contestant("eager"),
}
NAMES = (PEER, *OURS)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and faiss use one thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with library.one_thread():
            yield
    finally:
        faiss.omp_set_num_threads(before)


def search_of(problem: Problem, name: str, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """A search that is ready to run: returns indices [queries, k]."""
    if name == PEER:
        index = faiss.IndexFlatIP(problem.width)
        index.add(keys.numpy())
        given = queries.numpy()
        return lambda: torch.from_numpy(index.search(given, problem.k)[1])
    one = OURS[name]
    stored, scales = keys[None].to(one.dtype), None
    if one.dtype == torch.int8:
        stored, scales = quantize_keys(keys[None])

    def search() -> Tensor:
        with kernels(one.kernels):
            return topk_search(queries[None], stored, problem.k, scales=scales)[1][0]

    return search


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, one number per round."""

    processor: list[float]
    wall: list[float]

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Medians of processor time and of wall time."""
        return 1000 * statistics.median(self.processor), 1000 * statistics.median(self.wall)


def time_in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Times of runs that take turns, after one round that is not counted."""
    found = {name: Times([], []) for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            processor, wall = time.process_time(), time.perf_counter()
            run()
            if turn:
                found[name].processor.append(time.process_time() - processor)
                found[name].wall.append(time.perf_counter() - wall)
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two results are the same: shares of equal indices and of queries with equal lists,
    and the largest difference in float64 of the scores that stand in one place."""

    indices: float
    lists: float
    largest: float

    @property
    def within_rounding(self) -> bool:
        """Whether what differs differs by rounding alone; NaN does not."""
        return self.largest <= ROUNDING


def agreement(queries: Tensor, keys: Tensor, found: Tensor, expected: Tensor) -> Agreement:
    """Compare indices [queries, k]; a key that is listed twice makes the difference infinite."""
    same = found == expected
    scores = [
        (queries.double()[:, None] * keys[index].double()).sum(-1) for index in (found, expected)
    ]
    largest = float((scores[0] - scores[1]).abs().max())
    ordered = found.sort(1)[0]
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        largest = float("inf")
    return Agreement(float(same.double().mean()), float(same.all(1).double().mean()), largest)


def recall(found: Tensor, expected: Tensor) -> float:
    """The share of the expected indices [queries, k] that were found, in any order."""
    hits = (found[:, :, None] == expected[:, None]).any(1)
    return float(hits.double().mean())


def peak_memory(problem: Problem, name: str) -> int:
    """Bytes of a search at its peak, beside queries, keys and index, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(peak_growth, problem, name).result()


def peak_growth(problem: Problem, name: str) -> int:
    """`peak_memory` in this process."""
    with one_thread():
        small = Problem(256, problem.width, 32, problem.k)
        search_of(small, name, *small.vectors())()  # what libraries load at their first use
        search: Callable[[], Tensor] = search_of(problem, name, *problem.vectors())
        run: Run = lambda _: search()  # noqa: E731
        return resident_growth(run)
