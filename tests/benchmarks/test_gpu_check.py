import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a module that a step can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code):
        (tmp_path / "program.py").write_text(code)
        return "program"

    return write


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "gpu_check: torch finds no CUDA GPU\n"


@pytest.mark.parametrize(
    "code, seconds, verdict",
    [
        ("print('said')", 30, "passed"),
        ("print('said', flush=True); raise SystemExit(3)", 30, "failed (3)"),
        ("print('said', flush=True); import time; time.sleep(60)", 1.5, "stopped after 2 s"),
    ],
)
def test_how_a_step_went(tmp_path, program, capsys, code, seconds, verdict):
    step = gpu_check.Step("a step", program(code), (), seconds)
    outcome = gpu_check.run(step, tmp_path)
    assert outcome.verdict == verdict and outcome.seconds < 30
    assert (tmp_path / "a_step.log").read_text() == "said\n"
    assert "said" in capsys.readouterr().out


def test_steps_run_without_forced_kernels(tmp_path, program, monkeypatch, capsys):
    monkeypatch.setenv("MEMLM_KERNELS", "eager")
    name = program("import os; print({'MEMLM_KERNELS', 'TRITON_INTERPRET'} & {*os.environ})")
    gpu_check.run(gpu_check.Step("free", name, (), 30), tmp_path)
    assert (tmp_path / "free.log").read_text() == "set()\n"


def hide(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a)
    )


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    everything, cannot = gpu_check.steps(tmp_path)
    names = [step.name for step in everything]
    assert names == [
        "gpu tests",
        "other tests",
        "gated_delta",
        "titans",
        "product_key",
        "retrieval",
        "loss",
    ]
    assert cannot == [] and sum(step.seconds for step in everything) < 9 * 60
    with monkeypatch.context() as patch:
        hide(patch, "hypothesis")
        found, (missing,) = gpu_check.steps(tmp_path)
    assert [step.name for step in found] == names[:1] + names[2:]
    assert found[0].arguments[:2] == ("--confcutdir", "tests/cuda")
    assert "hypothesis is not installed" in missing.verdict
    with monkeypatch.context() as patch:
        hide(patch, "pytest")
        found, (missing,) = gpu_check.steps(tmp_path)
    assert [step.name for step in found] == names[2:]
    assert "pytest is not installed" in missing.verdict


def test_the_check_fails_where_a_step_fails(tmp_path, program, monkeypatch, capsys):
    bad = gpu_check.Step("bad", program("raise SystemExit(1)"), (), 30)
    missing = gpu_check.Outcome("tests", "not run: pytest is not installed")
    monkeypatch.setattr(gpu_check, "steps", lambda output: ([bad], [missing]))
    assert gpu_check.check(tmp_path / "out") == 1
    kept = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [step["verdict"] for step in kept["steps"]] == [missing.verdict, "failed (1)"]
    monkeypatch.setattr(gpu_check, "steps", lambda output: ([], []))
    assert gpu_check.check(tmp_path / "out") == 0


def test_gpu_tests_need_no_configuration_but_their_own():
    """On a machine without hypothesis and the libraries for data, every GPU test is collected."""
    program = """
import sys
for name in ("hypothesis", "datasets", "faiss", "jsonargparse", "matplotlib"):
    sys.modules[name] = None  # importing it is a ModuleNotFoundError
import benchmarks.gated_delta.__main__, pytest
options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu"]
sys.exit(pytest.main([*options, "--confcutdir", "tests/cuda", "tests/cuda/test_gpu.py"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis brings one
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test_recurrence_sizes_and_types[") == 10
