"""What the entry points share."""

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

from memlm.cli import run_entry_point
from memlm.gloo import hold_gloo

CODE = """
import sys
from memlm.cli import run_entry_point
sys.exit(run_entry_point(lambda: [print("a line") for _ in range(100_000)] and None))
"""


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


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
