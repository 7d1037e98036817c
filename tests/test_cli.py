"""What the entry points share."""

import gc
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

from memlm.cli import run_entry_point
from memlm.gloo import hold_gloo


def print_lines(pipe: Path, errors: Path) -> None:
    """A program whose output is read through `pipe`."""
    for number, path in ((1, pipe), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    sys.exit(run_entry_point(lambda: [print("a line") for _ in range(100_000)] and None))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    pipe, errors = tmp_path / "pipe", tmp_path / "errors"
    os.mkfifo(pipe)
    errors.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.training.main"])
    process = context.Process(target=print_lines, args=(pipe, errors))
    process.start()
    with pipe.open("rb") as reader:
        assert reader.readline() == b"a line\n"
    process.join(60)
    assert process.exitcode == 141
    assert errors.read_bytes() == b""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named in Linux only")
def test_no_thread_of_gloo_outlives_an_entry_point(monkeypatch, tmp_path):
    def threads():
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return names.count("pt_gloo_runloop")

    def work():
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
        hold_gloo()
        cycle = [distributed.group.WORLD]
        cycle.append(cycle)  # as models under DDP do
        distributed.destroy_process_group()
        del cycle
        gc.collect()
        # Whatever is collected before the end: the last reference is not left to it.
        assert threads() > others

    others = threads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_entry_point(work) == 0
    for _ in range(100):  # the system may list a thread for a moment after its end
        if threads() == others:
            return
        time.sleep(0.05)
    raise AssertionError(threads())
