"""Several finished evaluations as one."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlm.errors import UserError
from memlm.evaluation.comparison import compare_runs
from memlm.evaluation.ledger import FOLDER, Done
from memlm.evaluation.report.shape import name_of
from memlm.evaluation.results import RESULTS
from memlm.evaluation.tasks.base import Record

_KEYS = (
    "runs", "comparisons", "command", "config", "confidence", "seconds", "versions", "hashes",
)  # fmt: skip
_MODEL_KEYS = ("name", "source", "parameters", "attention_reach_tokens", "fingerprint")
_TASK_KEYS = (
    "title", "description", "metric", "axis", "kind", "scores", "memory_gain", "by_memory",
    "depths", "cost", "failures", "seconds",
)  # fmt: skip
_Records = dict[str, list[Record]]  # of one run, by task


def combine(folders: Sequence[Path]) -> dict[str, Any]:
    """The results of finished evaluations in one: all their runs, compared where records are left.

    Runs of the same name get the name of their folder added, or a number.

    Raises:
        UserError: for a folder without finished results, damaged files, or results with different
            levels of confidence.
    """
    parts = [read_results(folder) for folder in folders]
    if len({part["confidence"] for part in parts}) > 1:
        raise UserError(
            f"{folders[0]}: these evaluations have intervals of different confidence; combine only "
            "those of one"
        )
    records = [
        read_records(folder, part["runs"]) for folder, part in zip(folders, parts, strict=True)
    ]
    names = _rename(folders, parts)
    runs = [run for part in parts for run in part["runs"]]
    comparisons = compare_runs(runs, [tasks for mine in records for tasks in mine])
    for part, mine, new in zip(parts, records, names, strict=True):
        if not any(mine):
            # Without its records an evaluation keeps the comparisons within it.
            comparisons += [
                one | {"first": new[one["first"]], "second": new[one["second"]]}
                for one in part["comparisons"]
            ]
    return {
        "runs": runs,
        "comparisons": comparisons,
        "command": "\n".join(dict.fromkeys(part["command"] for part in parts if part["command"])),
        "config": {
            str(folder): part["config"] for folder, part in zip(folders, parts, strict=True)
        },
        "confidence": parts[0]["confidence"],
        "seconds": round(sum(part["seconds"] for part in parts), 2),
        "versions": {
            key: " or ".join(dict.fromkeys(part["versions"].get(key, "?") for part in parts))
            for key in dict.fromkeys(key for part in parts for key in part["versions"])
        },
        "hashes": {key: value for part in parts for key, value in part["hashes"].items()},
    }


def read_results(folder: Path) -> dict[str, Any]:
    """What results.json of a finished evaluation holds.

    Raises:
        UserError: when it is missing, or nothing that an evaluation of this version writes.
    """
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder}: no readable {RESULTS}; give the output folder of a finished evaluation"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON; give the output folder of an evaluation") from error
    missing = [key for key in _KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise UserError(
            f"{path}: no results of an evaluation of this version ({', '.join(missing)} missing)"
        )
    try:
        for run in found["runs"]:
            _require(run, ("model", "conditions", "notes", "tasks"))
            _require(run["model"], _MODEL_KEYS)
            for task, details in run["tasks"].items():
                # Names of tasks become names of files.
                if not re.fullmatch(r"\w+", task):
                    raise ValueError(task)
                _require(details, _TASK_KEYS)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged at {error}; run the evaluation again") from error
    if not found["runs"] or not all(run["tasks"] for run in found["runs"]):
        raise UserError(f"{path}: it holds no scores; give a finished evaluation")
    return found


def _require(found: dict[str, Any], keys: Sequence[str]) -> None:
    """Raise KeyError for the first key that is missing."""
    for key in keys:
        found[key]


def read_records(folder: Path, runs: Sequence[dict[str, Any]]) -> list[_Records]:
    """The records of every run by task; empty where the folder has none.

    Raises:
        UserError: for a damaged line.
    """
    found: list[_Records] = [{} for _ in runs]
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        # What a killed process left unfinished has no end of line.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                done = Done.from_json(line)
                found[done.batch.subject].setdefault(done.batch.task, []).extend(done.records)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(
                    f"{path}:{number}: no record of this evaluation; remove the folder {FOLDER} to "
                    "combine the results without comparisons"
                ) from error
    return found


def _rename(folders: Sequence[Path], parts: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Give all runs different names; returns new by old name for every part."""
    names = [name_of(run) for part in parts for run in part["runs"]]
    taken: set[str] = set()
    renamed = []
    for folder, part in zip(folders, parts, strict=True):
        new = {}
        for run in part["runs"]:
            old = name_of(run)
            wanted = f"{old} ({folder.resolve().name})" if names.count(old) > 1 else old
            name, number = wanted, 2
            while name in taken:
                name, number = f"{wanted} {number}", number + 1
            taken.add(name)
            new[old] = run["model"]["name"] = name
        renamed.append(new)
    return renamed
