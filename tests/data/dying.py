"""Processes that are killed at a chosen moment."""

import multiprocessing
import os
import signal
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")


def run_apart(function: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that calls a function, begun."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def deadly(moment: int) -> Callable[[Callable], Callable]:
    """Makes functions deadly: the process is killed where it calls any of them for the `moment`-th
    time in all."""
    calls = 0

    def make(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    return make
