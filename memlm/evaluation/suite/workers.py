"""Processes that take jobs in turn, and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from memlm.errors import UserError

_TICK = 1.0  # seconds between two looks at the clock
# One thread each: sums are then taken in one order, and small models gain nothing from more.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: its name.
        result: what its function returned; None where it failed.
        failure: a line that says how its process ended; None where it did not fail.
    """

    job: str
    result: Any = None
    failure: str | None = None


class Workers:
    """Runs jobs in processes of their own, each in one process after another.

    On a CPU a process computes in one thread; on GPUs each process sees one.

    Args:
        count: processes; None = one per GPU, or per CPU core where there is none.

    Attributes:
        running: the jobs that are at work.
    """

    def __init__(self, count: int | None = None):
        self.gpus = visible_gpus()
        self.count = count or len(self.gpus) or os.cpu_count()
        self._workers: list[_Worker] = []

    @property
    def running(self) -> list[str]:
        return [worker.job for worker in self._workers if worker.job is not None]

    def run(
        self, function: Callable[..., Any], jobs: Sequence[tuple[str, tuple]]
    ) -> Iterator[Outcome | None]:
        """Call `function` with the arguments of every job, the first ones first.

        Args:
            function: of a module, so that other processes find it.
            jobs: name and arguments of each.

        Yields:
            The jobs as they end; None about once a second while none does.

        Raises:
            UserError: that a job raised; all others end.
        """
        left = list(reversed(jobs))
        numbers = list(reversed(range(min(self.count, len(jobs)))))
        try:
            while left or self._workers:
                while left and numbers:
                    self._workers.append(_Worker(numbers.pop(), function, self.gpus))
                    self._workers[-1].give(*left.pop())
                ready = wait([worker.connection for worker in self._workers], timeout=_TICK)
                if not ready:
                    yield None
                for worker in [one for one in self._workers if one.connection in ready]:
                    outcome, alive = worker.take()
                    if alive and left:
                        worker.give(*left.pop())
                    else:
                        worker.end()
                        self._workers.remove(worker)
                        numbers.append(worker.number)
                    yield outcome
        finally:
            for worker in self._workers:
                worker.process.terminate()
            for worker in self._workers:
                worker.end()
            self._workers.clear()


class _Worker:
    """A process and the job that it is at."""

    def __init__(self, number: int, function: Callable[..., Any], gpus: Sequence[str]):
        self.number, self.job = number, None
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function, not gpus))
        with _environment(number, gpus), _no_interrupts():
            self.process.start()
        other.close()

    def give(self, job: str, arguments: tuple) -> None:
        """Let it begin a job."""
        self.job = job
        with contextlib.suppress(OSError):  # it is dead, which `take` will tell
            self.connection.send(arguments)

    def take(self) -> tuple[Outcome, bool]:
        """How its job ended, and whether the process lives on."""
        job, self.job = self.job, None
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Outcome(job, failure=_ending(self.process.exitcode)), False
        if kind == "mistake":
            raise UserError(f"{job}: {value}")
        return Outcome(job, **{kind: value}), True

    def end(self) -> None:
        """Let it end, if it has not, and wait for that."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.process.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{cause}"


def _serve(connection: Connection, function: Callable[..., Any], one_thread: bool) -> None:
    """Do jobs, given by their arguments, until None comes."""
    # Ctrl-C reaches all processes of a terminal; the one that was started decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Its own would be a semaphore of the system, and told of as lost when the process is ended.
    tqdm.set_lock(threading.RLock())
    if one_thread:
        torch.set_num_threads(1)
    while True:
        arguments = connection.recv()
        if arguments is None:
            return
        try:
            answer = ("result", function(*arguments))
        except UserError as error:
            answer = ("mistake", str(error))
        except Exception as error:
            traceback.print_exc()
            answer = ("failure", " ".join(f"{type(error).__name__}: {error}".split()))
        connection.send(answer)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, in whatever way."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def visible_gpus() -> list[str]:
    """The GPUs that a process here sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(n) for n in range(count)] if named is None else named.split(",")[:count]


@contextlib.contextmanager
def _environment(number: int, gpus: Sequence[str]) -> Iterator[None]:
    """What the process of that number is started with."""
    own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else _ONE_THREAD
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """A process that is started in here inherits that SIGINT waits, until it can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
