"""What a run folder tells of a model, read from its plain files."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from memlm.errors import UserError

RUN_FILE, CONFIG_FILE, METRICS_FILE, RESULTS_FILE = (
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "results.json",
)
CURVES_FILE = "training.png"


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """One task of an evaluation.

    Attributes:
        name, title, description, metric, kind: as in results.json; "losses" is the kind whose
            values are better when lower, all others are shares.
        scores: setting -> condition -> {"value", "low", "high", "count"}.
        confidence: of the intervals from low to high.
        picture: of the scores by length and depth, else of their curve; None = there is none.
    """

    name: str
    title: str
    description: str
    metric: str
    kind: str
    scores: dict[str, dict[str, dict[str, Any]]]
    confidence: float
    picture: Path | None


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """A run as its folder describes it; what the folder does not have is None or empty.

    Attributes:
        folder: of the run.
        config: config.yaml as text.
        sections: what it holds.
        start: the latest start in run.json: command, code, versions, processes.
        losses: the last record of an evaluation on held-out rows in metrics.jsonl.
        tasks: of all evaluations in the folder's own folders.
    """

    folder: Path
    config: str | None
    sections: dict[str, Any]
    start: dict[str, Any] | None
    losses: dict[str, Any] | None
    tasks: list[TaskScores]


def find_run(source: str | os.PathLike) -> Path | None:
    """The run folder that a model's folder is, or whose checkpoint it is; None for others."""
    folder = Path(source)
    for candidate in (folder, *folder.absolute().parents[1:2]):
        if str(source) and candidate.is_dir() and (candidate / RUN_FILE).is_file():
            return candidate
    return None


def read_run(folder: Path) -> RunFacts:
    """Everything that a model card tells of a run.

    Raises:
        UserError: for a file that is damaged.
    """
    config, sections = None, {}
    if (folder / CONFIG_FILE).is_file():
        config = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        try:
            sections = yaml.safe_load(config)
        except yaml.YAMLError as error:
            raise UserError(f"{folder / CONFIG_FILE}: damaged: it is no YAML") from error
    starts = _read_json(folder / RUN_FILE) or []
    return RunFacts(
        folder=folder,
        config=config,
        sections=sections if isinstance(sections, dict) else {},
        start=starts[-1] if starts else None,
        losses=_last_losses(folder / METRICS_FILE),
        tasks=list(_tasks(folder)),
    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: it is no JSON") from error


def _last_losses(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a killed run did not finish
            continue
        if record.get("evaluation") and "bits" in record:
            found = record
    return found


def _tasks(folder: Path) -> Iterator[TaskScores]:
    """The tasks in which this run's model was judged, those of the latest evaluations first."""
    files = [path for path in folder.glob(f"*/{RESULTS_FILE}") if path.is_file()]
    seen: set[str] = set()
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        results = _read_json(path)
        runs = results.get("runs", [])
        for number, run in enumerate(runs, start=1):
            source = run["model"].get("source")
            if len(runs) > 1 and (source is None or Path(source).resolve() != folder.resolve()):
                continue
            for name, task in run["tasks"].items():
                if name in seen:
                    continue
                seen.add(name)
                pictures = [f"{name}_depths_{number}.png", f"{name}_curves.png"]
                there = [path.with_name(p) for p in pictures if path.with_name(p).is_file()]
                words = {k: task[k] for k in ("title", "description", "metric", "kind", "scores")}
                confidence, picture = results["confidence"], there[0] if there else None
                yield TaskScores(name, **words, confidence=confidence, picture=picture)
