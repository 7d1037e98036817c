"""Processes that are killed (signal 9) while they write."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
TIMEOUT = 60


def killed_at(moment: int, folder: Path, function: Callable, *arguments: Any) -> bool:
    """Whether a process died of being killed at file operation `moment` of `function(*arguments)`.

    File operations are the opening, renaming and removing of whatever lies in `folder`, counted
    from 0; False: it had fewer.
    """
    process = server_context(function).Process(
        target=_count, args=(moment, folder, function, arguments)
    )
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def killed_after(seconds: float, ready: Path, function: Callable, *arguments: Any) -> None:
    """Kill `function(*arguments)`, which never ends, so long after the file `ready` appeared."""
    process = server_context(function).Process(target=_run, args=(function, arguments))
    process.start()
    end = time.monotonic() + TIMEOUT
    while not ready.exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL


def server_context(function: Callable) -> multiprocessing.context.BaseContext:
    """Processes come from a server that imports what the first of them needs once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.retrieval.corpus_store", function.__module__])
    return context


def _run(function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def _count(moment: int, folder: Path, function: Callable, arguments: tuple) -> None:
    seen = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal seen
        if event in _EVENTS and str(details[0]).startswith(str(folder)):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    _run(function, arguments)
