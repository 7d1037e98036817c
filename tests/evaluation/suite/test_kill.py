"""The command line as users know it: killed, started again, and ended by Ctrl-C."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

TIMES = ("seconds", "evaluation_seconds")


def start(path, output):
    words = [sys.executable, "-m", "memlm.evaluation.suite", path, "--output", output]
    return subprocess.Popen(
        [*map(str, words), "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(found, process):
    """Wait until `found()` is true, while the process is alive."""
    while not found():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def results(output):
    return without_times(json.loads((output / "results.json").read_text()))


@pytest.mark.slow
def test_a_killed_suite_ends_like_one_that_was_not(suite_file, tmp_path):
    path = suite_file(base__train__steps=150, base__train__save_every=20, seeds=[0, 1, 2])
    whole, output = tmp_path / "whole", tmp_path / "killed"
    process = start(path, whole)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said

    process = start(path, output)
    cells = output / "cells"
    wait_for(lambda: cells.exists() and list(cells.glob("*.json")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    done = {one.name: one.stat().st_mtime_ns for one in cells.glob("*.json")}
    assert 0 < len(done) < 6
    assert not (output / "results.json").exists()

    process = start(path, output)
    table, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert f"{len(done)} of 6 cells are done" in said
    assert {name: (cells / name).stat().st_mtime_ns for name in done} == done
    assert (output / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert (output / "table.md").read_text().strip() in table
    found, expected = results(output), results(whole)
    for key in ("points", "cells"):
        assert found[key] == expected[key]
    assert not (output / "runs").exists()
    assert json.loads((output / "suite.json").read_text())["suite"] == "tiny"


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_in_one_line(suite_file, tmp_path):
    process = start(suite_file(base__train__steps=100_000), tmp_path / "out")
    runs = tmp_path / "out" / "runs"
    wait_for(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    # As a terminal does: to all of them.
    for one in [process, *family]:
        one.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("interrupted; finished cells are kept, go on with: python -m memlm.eval")
    assert said.count("\n") == 1
    assert psutil.wait_procs(family, timeout=10)[1] == []
