"""A suite from beginning to end: what is missing is trained, and all of it is reported."""

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from tqdm import tqdm

from memlm.errors import UserError
from memlm.evaluation.runner import versions
from memlm.evaluation.suite.cell import run_cell
from memlm.evaluation.suite.cells import AXES, Cell
from memlm.evaluation.suite.config import SuiteConfig
from memlm.evaluation.suite.identity import check_identity, code_revision, identity_of
from memlm.evaluation.suite.points import make_points
from memlm.evaluation.suite.workers import Outcome
from memlm.files import try_lock, write_file

IDENTITY, CELLS, RUNS = "suite.json", "cells", "runs"
RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"
_MAPPINGS = ("state_bytes", "memory_state_bytes", "scores", "measures", "held_out")
_NUMBERS = ("steps", "seconds", "evaluation_seconds")


class Work(Protocol):
    """What jobs are given to; see `workers.Workers`."""

    count: int
    running: Sequence[str]

    def run(self, function: Any, jobs: Sequence[tuple[str, tuple]]) -> Iterator[Outcome | None]:
        """See `workers.Workers.run`."""


def run_suite(
    suite: SuiteConfig,
    cells: Sequence[Cell],
    folder: Path,
    work: Work,
    command: str,
    keep_runs: bool = False,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Train and evaluate the cells that the folder does not hold, and report on all of them.

    Args:
        suite: the suite.
        cells: of it, all or some.
        folder: of the results; one that holds some of them goes on.
        work: the processes.
        command: that repeats it.
        keep_runs: keep the run folders of finished cells, with curves.

    Returns:
        What results.json holds (None where no cell is finished), and the cells that are missing
        because their processes failed.

    Raises:
        UserError: when another suite, or the same one with other settings, is in the folder, and
            for what a cell cannot be trained with.
    """
    with _held(folder):
        revisions = check_identity(folder / IDENTITY, identity_of(suite, cells), code_revision())
        done = {cell.key: found for cell in cells if (found := _read(folder, cell)) is not None}
        left = [cell for cell in cells if cell.key not in done]
        for key in done if not keep_runs else ():  # a kill may have come in between
            _forget(key, folder)
        if done and left:
            print(f"{folder}: {len(done)} of {len(cells)} cells are done", file=sys.stderr)
        if done and len(revisions) > 1:
            known = ", ".join(one or "unknown" for one in revisions)
            print(
                f"{folder}: code of several revisions has worked here ({known}); its cells can be "
                "compared if the changes between them leave numbers alone",
                file=sys.stderr,
            )
        _run(left, folder, work, done, keep_runs)
        missing = [cell.key for cell in cells if cell.key not in done]
        if not done:
            return None, missing
        found = [done[cell.key] for cell in cells if cell.key in done]
        results = make_results(suite, found, command, work.count)
        results |= {"missing": missing, "revisions": revisions}
        _write(results, folder)
    return results, missing


def make_results(
    suite: SuiteConfig, cells: Sequence[dict[str, Any]], command: str, processes: int
) -> dict[str, Any]:
    """What results.json holds."""
    seconds = sum(cell["seconds"] + cell["evaluation_seconds"] for cell in cells)
    return {
        "suite": suite.name,
        "preset": suite.preset,
        "title": suite.title,
        "question": suite.question,
        "command": command,
        "report": suite.report,
        "seconds": round(seconds, 1),
        "machine": machine() | {"processes": processes},
        "versions": versions(),
        "points": make_points(cells),
        "cells": list(cells),
    }


def machine() -> dict[str, Any]:
    """What the cells are trained on: its processor, cores and GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _run(
    cells: Sequence[Cell], folder: Path, work: Work, done: dict[str, Any], keep_runs: bool
) -> None:
    """Put what comes of the cells into `done` and the folder, the longest ones first."""
    order = sorted(cells, key=lambda cell: cell.work, reverse=True)
    jobs = [(cell.key, (cell, folder / RUNS / cell.key, keep_runs)) for cell in order]
    # On a terminal only: elsewhere the lines say the same.
    ended, total = len(done), len(done) + len(cells)
    bar = tqdm(total=total, initial=ended, unit="cell", disable=None)
    with bar, contextlib.closing(work.run(run_cell, jobs)) as outcomes:
        for outcome in outcomes:
            bar.set_postfix_str(", ".join(work.running), refresh=True)
            if outcome is None:
                continue
            if outcome.failure is not None:
                log = folder / RUNS / f"{outcome.job}.log"
                said = f"failed, {outcome.failure}; the others go on ({log})"
            else:
                done[outcome.job] = outcome.result
                _keep(outcome.job, outcome.result, folder, keep_runs)
                said = describe(outcome.result)
            ended += 1
            bar.update()
            bar.write(f"[{ended}/{total}] {outcome.job}: {said}", file=sys.stderr)


def describe(cell: dict[str, Any]) -> str:
    """A cell in a line: its scores at the first and the last setting, and its seconds."""
    said = []
    for task, settings in cell["scores"].items():
        ends = dict.fromkeys((next(iter(settings)), next(reversed(settings))))
        values = (f"{setting}: {_score(settings[setting])}" for setting in ends)
        said.append(f"{task} {', '.join(values)}")
    if cell["error"] is not None:
        said.append(cell["error"])
    seconds = cell["seconds"] + cell["evaluation_seconds"]
    return f"{'; '.join(said)} ({cell['steps']} steps, {seconds:.0f} s)"


def _score(conditions: dict[str, float | None]) -> str:
    value = conditions.get("on", next(iter(conditions.values())))
    return "none" if value is None else f"{value:.3f}"


def _keep(key: str, cell: dict[str, Any], folder: Path, keep_runs: bool) -> None:
    _put(folder / CELLS / f"{key}.json", _json(cell))
    if not keep_runs:
        _forget(key, folder)


def _forget(key: str, folder: Path) -> None:
    """Delete the run folder of a finished cell."""
    shutil.rmtree(folder / RUNS / key, ignore_errors=True)
    (folder / RUNS / f"{key}.log").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are others
        (folder / RUNS).rmdir()


def _read(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A finished cell; None for one that is not.

    Raises:
        UserError: for a file that holds something else, or another cell.
    """
    path = folder / CELLS / f"{cell.key}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a cell of a suite; delete it to train it again") from error
    if not _is_cell(found):
        raise UserError(f"{path}: not a cell of a suite; delete it to train it again")
    if {"key": cell.key} | cell.place != {name: found.get(name) for name in ("key", *AXES)}:
        raise UserError(
            f"{path}: holds the cell {found.get('key')!r}; delete it to train its own again"
        )
    return found


def _is_cell(found: Any) -> bool:
    """Whether it has what reports read of a cell."""
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), dict) for name in _MAPPINGS)
        and all(isinstance(found.get(name), int | float) for name in _NUMBERS)
        and {"parameters", "flops_per_token", "error"} <= found.keys()
    )


def _write(results: dict[str, Any], folder: Path) -> None:
    from memlm.evaluation.suite.reports import draw_plot, make_table

    _put(folder / TABLE, make_table(results) + "\n")
    _put(folder / PLOT, draw_plot(results))
    _put(folder / RESULTS, _json(results))


def _put(path: Path, content: str | bytes) -> None:
    """Write a file whole, in a folder that may be missing."""
    data = content.encode() if isinstance(content, str) else content
    write_file(path, lambda new: new.write_bytes(data), then="give the same command again")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[FileLock]:
    """Make the folder, and keep other suites out of it."""
    try:
        lock = try_lock(folder / ".lock")
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from error
    if lock is None:
        raise UserError(f"--output: another suite is writing into {folder}")
    with lock:
        yield lock
