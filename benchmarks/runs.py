"""A JSON file of training runs that grows run by run, so that a benchmark can be resumed."""

import json
from pathlib import Path
from typing import Any

from benchmarks import report

Runs = dict[str, dict[str, Any]]


def load_runs(path: Path) -> Runs:
    """The runs by key; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}


def save_run(run: dict[str, Any], key: str, path: Path) -> None:
    """Add `run`, or replace the one with that key, together with the machine it ran on."""
    # Read again before writing: another process may have added runs meanwhile.
    runs = load_runs(path) | {key: {**run, "machine": report.machine()}}
    report.save_json({"runs": runs}, path)
