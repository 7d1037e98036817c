"""Runs functions in several CPU processes that talk through gloo."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT = 120


def run_processes(count: int, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `count` processes, by rank.

    The processes come from a server that imports torch and memlm once.

    Raises:
        AssertionError: with the traceback of the first process that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.training.main"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, count, folder, function, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        for process in processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        errors = sorted(Path(folder).glob("error_*"), key=lambda path: path.stat().st_mtime)
        assert not errors, errors[0].read_text()
        assert all(process.exitcode == 0 for process in processes), "processes wait for each other"
        return [torch.load(Path(folder) / f"result_{rank}") for rank in range(count)]


def _run(
    rank: int, count: int, folder: str, function: Callable, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    try:
        result = function(*arguments)
        torch.save(result, f"{folder}/result_{rank}")
        dist.barrier()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
