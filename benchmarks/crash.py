"""Runs that are killed at random moments and go on: `python -m benchmarks.crash`.

A tiny run with carried memory states, which saves a checkpoint after every step, is killed with
SIGKILL again and again and started again with `--resume auto` until it is done. Half of the kills
come at any time, the others while a checkpoint is written. In the end it has to have the weights,
losses and gradient norms of a run that was never killed, bit by bit, and nothing half written.

The processes are forked from a server that has imported everything: a kill then finds the run at
work and not its imports.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks import report
from benchmarks.library import positive
from memlm.config import RunConfig, TrainConfig, save_config
from memlm.data import DataConfig
from memlm.errors import UserError
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.main import main as train
from memlm.training.manifest import check_manifest
from memlm.training.retention import complete_checkpoints, step_of

PATIENCE = 120  # seconds after which an attempt hangs
LAYERS = [
    {
        "repeat": 2,
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": {"type": "product_key", "num_keys": 16, "num_heads": 2, "top_k": 4},
    }
]


@dataclass
class Kill:
    """One SIGKILL.

    Attributes:
        seconds: since the start of the process.
        moment: what the run folder says it was doing.
        newest: steps of the newest checkpoint left; None = there was none yet.
    """

    seconds: float
    moment: str
    newest: int | None


@dataclass
class Outcome:
    """A run that was killed and went on.

    Attributes:
        run: its number.
        kills: in order; the attempt after the last one did the rest.
        problems: what differs from the run that was never killed, or cannot be read.
    """

    run: int
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Crashes:
    """Starts and kills runs of one config in a folder of their own.

    Args:
        folder: where runs, data and logs go.
        steps: of a run.
        seed: of the moments.
    """

    def __init__(self, folder: Path, steps: int = 16, seed: int = 0):
        self.folder, self.steps, self.rng = folder, steps, random.Random(seed)
        words = ["memory", "reads", "the", "state", "and", "writes", "again", "slowly"]
        text = random.Random(0)
        (folder / "corpus").mkdir(parents=True)
        for index in range(20):
            line = " ".join(text.choice(words) for _ in range(400))
            (folder / "corpus" / f"{index}.txt").write_text(line, encoding="utf-8")
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["memlm.training.main"])
        self._wait(self._start(self._config("first")))  # the server's imports are not timed
        self.reference = self._config("reference")
        started, began = time.perf_counter(), time.time()
        code = self._wait(self._start(self.reference))
        if code != 0:
            raise RuntimeError(f"the run that nobody killed ended with {code}: {self._log()}")
        self.seconds = time.perf_counter() - started
        # Drawing its curves takes as long as all the rest.
        self.window = 1.1 * ((self.reference / "model.safetensors").stat().st_mtime - began)
        self.weights = load_file(self.reference / "model.safetensors")
        self.records = _losses(self.reference)

    def _config(self, name: str) -> Path:
        """Write the config of a run; returns the run folder."""
        run = self.folder / name
        source = {"type": "text", "files": [str(self.folder / "corpus")]}
        config = RunConfig(
            model={"hidden_size": 16, "intermediate_size": 32, "layers": LAYERS},
            data=DataConfig(sources=[source]),
            train=TrainConfig(
                output_dir=str(run),
                steps=self.steps,
                length=64,
                tokens_per_step=256,
                carry_state=True,
                warmup_steps=2,
                log_every=1,
                evaluate_every=5,
                evaluation_rows=4,
                save_every=1,
                keep_checkpoints=2,
                keep_every=6,
            ),
        )
        save_config(config, run.with_suffix(".yaml"))
        return run

    def _start(self, run: Path) -> multiprocessing.Process:
        arguments = ["--config", str(run.with_suffix(".yaml")), "--resume", "auto"]
        process = self.processes.Process(target=_attempt, args=(arguments, self.folder / "log"))
        process.start()
        return process

    def _wait(self, process: multiprocessing.Process) -> int | None:
        """The exit code, None for a process that hangs (it is killed)."""
        process.join(PATIENCE)
        code = process.exitcode
        process.kill()
        process.join()
        return code

    def _log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")[-2000:]

    def run(self, number: int, kills: int) -> Outcome:
        """Start a run, kill it `kills` times, let it end, and compare it with the reference."""
        run, outcome = self._config(f"run{number}"), Outcome(number)
        for index in range(kills):
            process, started = self._start(run), time.perf_counter()
            if (number + index) % 2:
                self._wait_for_writing(process, run)
            else:
                process.join(self.rng.uniform(0, self.window))
            seconds = time.perf_counter() - started
            process.kill()
            process.join()
            if process.exitcode == 0:
                break  # it had done all its steps before
            if process.exitcode != -9:
                outcome.problems.append(f"ended with {process.exitcode}: {self._log()}")
                return outcome
            found = complete_checkpoints(run)
            newest = step_of(found[-1]) if found else None
            outcome.kills.append(Kill(round(seconds, 3), _moment(run), newest))
            outcome.problems += _unreadable(found)
        code = self._wait(self._start(run))
        if code != 0:
            outcome.problems.append(f"ended with {code}: {self._log()}")
            return outcome
        outcome.problems += self._compare(run)
        return outcome

    def _wait_for_writing(self, process: multiprocessing.Process, run: Path) -> None:
        """Wait for one of the next checkpoints to be begun, and a moment more."""
        deadline = time.perf_counter() + self.window
        for _ in range(self.rng.randint(1, self.steps // 3)):
            for there in (False, True):
                while bool(list((run / "checkpoints").glob(".step_*"))) != there:
                    if process.exitcode is not None or time.perf_counter() > deadline:
                        return
                    time.sleep(0.0005)
        time.sleep(self.rng.uniform(0, 0.03))

    def _compare(self, run: Path) -> list[str]:
        """What is not as in the reference."""
        weights = load_file(run / "model.safetensors")
        problems = [
            f"{name} differs"
            for name in sorted(self.weights.keys() | weights.keys())
            if name not in weights
            or name not in self.weights
            or not torch.equal(self.weights[name], weights[name])
        ]
        if _losses(run) != self.records:
            problems.append("losses or gradient norms differ")
        here, there = (
            {_under(folder, p) for p in folder.rglob("*")} for folder in (run, self.reference)
        )
        problems += [f"left over or missing: {name}" for name in sorted(here ^ there)]
        return problems + _unreadable(complete_checkpoints(run))


def _attempt(arguments: list[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    sys.exit(train(arguments))


def _under(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _losses(run: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "bits")
    return [tuple(r.get(name) for name in names) for r in read_metrics(run / METRICS_FILE)]


def _unreadable(found: list[Path]) -> list[str]:
    problems = []
    for path in found:
        try:
            check_manifest(path)
        except UserError as error:
            problems.append(str(error))
    return problems


def _moment(run: Path) -> str:
    """What a killed run was doing, by what it left."""
    if not (run / "config.yaml").is_file():
        return "before its folder was there"
    kinds = {".partial": "writing", ".old": "replacing", ".removed": "deleting"}
    for path in (run / "checkpoints").glob(".*"):
        return f"{kinds[path.suffix]} {path.stem.removeprefix('.')}"
    if (run / "checkpoints" / "final").exists():
        return "placing the model"
    if (run / "model.safetensors").is_file():
        return "drawing the picture"
    records = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    return f"after the record of step {records[-1]['step']}" if records else "before any step"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit code is 1 where a run did not end as it should."""
    parser = argparse.ArgumentParser(prog="benchmarks.crash", description=__doc__)
    parser.add_argument("--runs", type=positive, default=30)
    parser.add_argument("--kills", type=positive, default=2, help="of each run; default 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memlm-crash-") as folder:
        crashes = Crashes(Path(folder), seed=options.seed)
        print(
            f"a run that nobody kills takes {crashes.seconds:.1f} s",
            flush=True,
        )
        outcomes = []
        for number in range(1, options.runs + 1):
            outcomes.append(crashes.run(number, options.kills))
            kills = "; ".join(f"{kill.moment} ({kill.seconds} s)" for kill in outcomes[-1].kills)
            ended = "; ".join(outcomes[-1].problems) or "identical"
            print(f"run {number}: {kills}: {ended}", flush=True)
        seconds = crashes.seconds
    rows = [
        (
            outcome.run,
            kill.seconds,
            kill.moment,
            kill.newest,
            "; ".join(outcome.problems) or "identical",
        )
        for outcome in outcomes
        for kill in outcome.kills
    ]
    header = ("run", "killed after s", "while", "newest checkpoint", "final weights and losses")
    print("\n" + report.table(header, rows))
    good = sum(not outcome.problems for outcome in outcomes)
    writing = sum(row[2].startswith(("writing", "replacing", "deleting")) for row in rows)
    print(
        f"\n{len(rows)} kills, {writing} of them in a checkpoint; {good} of {len(outcomes)} runs "
        "ended bit-identical with nothing unreadable left"
    )
    results = {
        "machine": report.machine(),
        "settings": {"runs": options.runs, "kills": options.kills, "seed": options.seed},
        "seconds_of_a_run": seconds,
        "kills": len(rows),
        "kills_in_a_checkpoint": writing,
        "identical": good,
        "outcomes": outcomes,
    }
    print(report.save_json(results, options.output / report.machine_name() / "crash.json"))
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
