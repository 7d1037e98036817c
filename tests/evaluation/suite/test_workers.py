import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest

from memlm.errors import UserError
from memlm.evaluation.suite import workers
from memlm.evaluation.suite.workers import Outcome, Workers


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import everything again; what they do here is harmless."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: fork)
    # OpenMP does not survive a fork.
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(workers, "_TICK", 0.05)


def act(what, value):
    """A job: what becomes of a process."""
    if what == "mistake":
        raise UserError(value)
    if what == "bug":
        raise KeyError(value)
    if what == "signal":
        os.kill(os.getpid(), value)
    if what == "exit":
        os._exit(value)
    if what == "sleep":
        time.sleep(value)
    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), value


def ended(outcomes):
    return {one.job: one for one in outcomes if one is not None}


def test_jobs_are_shared_and_those_of_a_dead_process_are_told(forked, capfd):
    jobs = [
        ("a", ("return", 1)),
        ("b", ("signal", signal.SIGKILL)),
        ("c", ("exit", 3)),
        ("d", ("bug", "x")),
        ("e", ("return", 2)),
        ("f", ("return", 3)),
    ]
    found = ended(Workers(2).run(act, jobs))
    assert len(found) == 6
    assert [found[job].result[1:] for job in "aef"] == [("1", 1), ("1", 2), ("1", 3)]
    assert all(found[job].result[0] != os.getpid() for job in "aef")
    killed = "its process was ended by SIGKILL, perhaps for want of memory"
    assert found["b"] == Outcome("b", failure=killed)
    assert found["c"] == Outcome("c", failure="its process ended with exit code 3")
    assert found["d"] == Outcome("d", failure="KeyError: 'x'")
    assert "in act" in capfd.readouterr().err  # the traceback


def test_one_process_takes_the_jobs_in_turn_and_tells_of_the_one_it_is_at(forked):
    work, seen = Workers(1), []
    for outcome in work.run(act, [(name, ("sleep", 0.2)) for name in "ab"]):
        seen.append(list(work.running) if outcome is None else outcome.job)
    assert [one for n, one in enumerate(seen) if one != seen[n - 1]] == [["a"], "a", ["b"], "b"]
    found = [one.result for one in work.run(act, [(n, ("return", n)) for n in "abc"]) if one]
    assert [value for *_, value in found] == ["a", "b", "c"]
    assert len({process for process, *_ in found}) == 1
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == "1"


@pytest.fixture
def children():
    """The processes that a test has started; other tests may have left servers of theirs."""
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    return lambda: [
        one for one in psutil.Process().children(recursive=True) if one.pid not in before
    ]


def test_a_mistake_ends_all_of_it(forked, children):
    with pytest.raises(UserError, match="b: wrong key"):
        list(Workers(2).run(act, [("long", ("sleep", 60)), ("b", ("mistake", "wrong key"))]))
    assert children() == []


def test_processes_end_when_nobody_waits_for_them_and_ctrl_c_is_not_theirs(forked, children):
    with closing(Workers(2).run(act, [("a", ("sleep", 60)), ("b", ("sleep", 60))])) as outcomes:
        assert next(outcomes) is None
        time.sleep(0.2)
        for child in children():
            child.send_signal(signal.SIGINT)
        assert next(outcomes) is None
        assert len(children()) == 2
    assert children() == []


def test_each_process_sees_one_gpu(forked, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    work = Workers()
    assert (work.gpus, work.count) == (["3", "5"], 2)
    seen = [one.result for one in Workers(3).run(visible, [(n, (0.3,)) for n in "abc"]) if one]
    assert sorted(seen) == ["3", "3", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def visible(seconds):
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]


PARENT = """
import sys, time
from memlm.evaluation.suite.workers import Workers
if __name__ == "__main__":
    for outcome in Workers(2).run(time.sleep, [("a", (600,)), ("b", (600,))]):
        print("waiting", flush=True)
"""


@pytest.mark.slow
def test_processes_of_a_killed_parent_end_by_themselves(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        family = []
        while len(family) < 2:
            assert "waiting" in parent.stdout.readline()
            family = [
                child
                for child in psutil.Process(parent.pid).children(recursive=True)
                if "spawn_main" in " ".join(child.cmdline())
            ]
        time.sleep(20)  # until they have imported everything and are at work
        parent.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
