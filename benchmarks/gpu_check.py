"""Everything that needs a GPU, in under nine minutes: ``python -m benchmarks.gpu_check``.

First the GPU tests, then the benchmarks, each in a process of its own with a time limit. What they
print and write goes to benchmarks/results/MACHINE/, or to the folder that $OUT names. Exit code 0
where all passed, 1 where something failed or could not run, 2 without a GPU.

`benchmarks.pretrain`, ten models in training, has no room in the nine minutes and is run apart.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from memlm.cuda.dispatch import VARIABLE

ROOT = Path(__file__).parents[1]
TESTS = ("tests/cuda", "tests/layers", "tests/memory/test_gated_delta.py")


@dataclasses.dataclass(frozen=True)
class Step:
    """One command: a module and its arguments, and seconds it may take."""

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step went: "passed", "failed (code)", "stopped after ... s" or why it did not run."""

    name: str
    verdict: str
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def steps(output: Path) -> tuple[list[Step], list[Outcome]]:
    """What to run here, and what cannot be run with the reason."""
    cannot = []
    found = []
    if importlib.util.find_spec("pytest") is None:
        cannot.append(Outcome("tests", "not run: pytest is not installed"))
    else:
        options = ("-q", "-m", "gpu", "-p", "no:cacheprovider")
        found.append(Step("gpu tests", "pytest", (*_configuration(), *options, "tests/cuda"), 165))
        if importlib.util.find_spec("hypothesis") is None:
            cannot.append(Outcome("other tests", "not run: hypothesis is not installed"))
        else:
            others = ("-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider", *TESTS)
            found.append(Step("other tests", "pytest", others, 70))
    measured = ("--device", "cuda", "--seconds", "40", "--output", str(output.parent))
    found.append(Step("gated_delta", "benchmarks.gated_delta", measured, 62))
    options = ("--device", "cuda", "--output", str(output.parent))
    found.append(Step("titans", "benchmarks.titans", options, 75))
    found.append(Step("product_key", "benchmarks.product_key", options, 65))
    found.append(Step("retrieval", "benchmarks.retrieval", (*options, "--repeats", "5"), 50))
    found.append(Step("loss", "benchmarks.loss", (*options, "--repeats", "5"), 50))
    return found, cannot


def _configuration() -> tuple[str, ...]:
    """Without hypothesis the configuration of all tests cannot be loaded, that of GPU tests can."""
    if importlib.util.find_spec("hypothesis") is None:
        return ("--confcutdir", "tests/cuda")
    return ()


def run(step: Step, output: Path) -> Outcome:
    """Run one step; its output is printed, and kept in `output`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (VARIABLE, "TRITON_INTERPRET")
    }
    environment["PYTHONUNBUFFERED"] = "1"
    path = output / f"{step.name.replace(' ', '_')}.log"
    start = time.perf_counter()
    command = [sys.executable, "-m", step.module, *step.arguments]
    print(f"\n== {step.name}: {' '.join(command[1:])}", flush=True)
    with path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(step.seconds)
            verdict = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            verdict = f"stopped after {step.seconds:.0f} s"
    print(path.read_text(encoding="utf-8", errors="replace"), flush=True)
    return Outcome(step.name, verdict, round(time.perf_counter() - start, 1))


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__)
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    return check(_output())


def _output() -> Path:
    return Path(os.environ.get("OUT") or report.RESULTS) / report.machine_name()


def check(output: Path) -> int:
    """Run all steps and say how they went."""
    output.mkdir(parents=True, exist_ok=True)
    found, outcomes = steps(output)
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.verdict}")
    # Results so far outlive an interruption.
    for step in found:
        outcomes.append(run(step, output))
        results = {"machine": report.machine(), "steps": outcomes}
        report.save_json(results, output / "gpu_check.json")
    print(report.table(("step", "verdict", "seconds"), [dataclasses.astuple(o) for o in outcomes]))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
