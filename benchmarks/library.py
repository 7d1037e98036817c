"""Time, memory and ceilings, alike on a CPU and on a GPU.

Runs that are compared take turns (A B A B ...), so that a disturbance or a change of clock meets
all of them; what counts is the median of the ratios within a turn.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

Run = Callable[[int], object]  # takes a running number, to choose among several input sets
SHORTEST_SAMPLE = {"cpu": 2e-3, "cuda": 2e-3}  # seconds; shorter runs are repeated within a sample
FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times longer than another run: median, first and third quartile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: only then is processor time what a run took."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_interleaved(
    runs: Mapping[str, Run],
    device: torch.device | str = "cpu",
    repeats: int = 10,
    limit: float | None = None,
) -> dict[str, list[float] | str]:
    """Seconds per call of each run, one number per round; all runs have as many.

    Args:
        runs: by name, what to time.
        device: on the CPU processor time is taken (of one thread: see `one_thread`), on a GPU the
            time between two events of the stream.
        repeats: rounds.
        limit: seconds after which no further round begins, once there are FEWEST_ROUNDS.

    Returns:
        The times by name; for a run that raises, the reason instead.
    """
    device = torch.device(device)
    results: dict[str, list[float] | str] = {}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        try:
            run(0)  # compiles, allocates, fills caches
            once = _sample(run, device, 1, 1)
            calls[name] = max(1, round(SHORTEST_SAMPLE[device.type] / max(once, 1e-7)))
            results[name] = []
        except Exception as failure:  # a peer that cannot is a row of the table
            results[name] = describe(failure)
    start = time.perf_counter()
    for turn in range(repeats):
        over = limit is not None and time.perf_counter() - start > limit
        if turn >= FEWEST_ROUNDS and over:
            break
        for name, count in list(calls.items()):
            try:
                results[name].append(_sample(runs[name], device, count, 2 + turn * count))
            except Exception as failure:  # memory may run out later than in the first call
                results[name] = describe(failure)
                del calls[name]
    return results


def _sample(run: Run, device: torch.device, calls: int, first: int) -> float:
    if device.type == "cpu":
        start = time.process_time()
        for number in range(first, first + calls):
            run(number)
        return (time.process_time() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for number in range(first, first + calls):
        run(number)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def describe(failure: BaseException) -> str:
    """One line about an exception."""
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text}"[:160]


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """`times` over `base`, round by round.

    Raises:
        ValueError: not the same number of rounds, or none.
    """
    if len(times) != len(base) or not times:
        raise ValueError(f"ratio of {len(times)} rounds over {len(base)}")
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)


def input_sets(bytes_of_a_set: int, device: torch.device | str) -> int:
    """How many sets of inputs to take in turn: three times the GPU's L2 cache in all, so that
    little of a set is still there when its turn comes again."""
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-3 * cache // max(1, bytes_of_a_set)))


def peak_memory(run: Run, device: torch.device | str) -> int | None:
    """Bytes that a call allocates at its peak, beyond what is held before; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_allocated(run: Run) -> int:
    """Bytes of a CPU's memory that torch takes in a call at its peak, beyond what it held before.

    The calls of operations within custom ops count as well; what libraries take by themselves, such
    as the work space of a product, does not.
    """
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        run(0)
    events = profile.kineto_results.events()
    changes = sorted(
        (event.start_ns(), place, event.nbytes())
        for place, event in enumerate(events)
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((change for *_, change in changes), initial=0))


def resident_growth(run: Run) -> int:
    """Bytes by which a call raises the process's resident memory at its peak. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that the call cannot reuse freed memory unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS")
    run(0)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found.group(1))


def copy_ceiling(device: torch.device | str, size: int | None = None) -> float:
    """Bytes per second, read and written, that copying a large buffer reaches here.

    size: bytes of the buffer; default 1 GiB on a GPU, 64 MiB on a CPU.
    """
    size = size or (1 << 30 if torch.device(device).type == "cuda" else 1 << 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda _: target.copy_(source)}, device)["copy"]
    return 2 * size / statistics.median(times)


def matmul_ceiling(
    device: torch.device | str, dtype: torch.dtype, size: int | None = None
) -> float:
    """FLOPs per second that one large square product reaches here.

    size: rows and columns; default 8192 on a GPU, 1024 on a CPU.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = time_interleaved({"matmul": lambda _: a @ b}, device)["matmul"]
    return 2 * size**3 / statistics.median(times)


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)
