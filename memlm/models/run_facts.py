"""What a run folder tells of a model, read from its plain files."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memlm.errors import UserError
from memlm.fingerprint import fingerprint

RUN_FILE, CONFIG_FILE, METRICS_FILE, RESULTS_FILE = (
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "results.json",
)
STATE_FILE = "state.json"  # of a checkpoint
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
        step: of a checkpoint; None for the model at the end of the run.
        config: config.yaml as text.
        sections: what it holds.
        start: the latest start in run.json: command, code, versions, processes.
        losses: the record of an evaluation on held-out rows in metrics.jsonl: the last one, or that
            of the checkpoint's step.
        tasks: of all evaluations in the folder's own folders in which these very weights were
            judged.
    """

    folder: Path
    step: int | None
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


def read_run(source: Path) -> RunFacts | None:
    """Everything that a model card tells of the model in a run folder, or in a checkpoint of one.

    None for any other folder.

    Raises:
        UserError: for a file that is damaged.
    """
    folder = find_run(source)
    if folder is None:
        return None
    config, sections = None, {}
    if (folder / CONFIG_FILE).is_file():
        config = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        try:
            sections = yaml.safe_load(config)
        except yaml.YAMLError as error:
            raise UserError(f"{folder / CONFIG_FILE}: damaged: it is no YAML") from error
    starts = _read_json(folder / RUN_FILE) or []
    step = None
    if source.resolve() != folder.resolve():
        step = (_read_json(source / STATE_FILE) or {}).get("step")
    return RunFacts(
        folder=folder,
        step=step,
        config=config,
        sections=sections if isinstance(sections, dict) else {},
        start=starts[-1] if starts else None,
        losses=_losses(folder / METRICS_FILE, step),
        tasks=list(_tasks(folder, source)),
    )


def weights_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the state dict of the model in a folder; None where it holds no weights.

    Raises:
        UserError: when the weights are damaged.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("model*.safetensors")):
            tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights are damaged (no safetensors file)") from error
    if not tensors:
        return None
    if "model.embed_tokens.weight" in tensors:  # tied weights are saved once
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return fingerprint(tensors)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: it is no JSON") from error


def _losses(path: Path, step: int | None) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a killed run did not finish
            continue
        if record.get("evaluation") and "bits" in record and step in (None, record["step"]):
            found = record
    return found


def _tasks(folder: Path, source: Path) -> Iterator[TaskScores]:
    """The tasks in which the model in `source` was judged, of the latest evaluations first."""
    files = [path for path in folder.glob(f"*/{RESULTS_FILE}") if path.is_file()]
    if not files:
        return
    weights = weights_fingerprint(source)
    seen: set[str] = set()
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        results = _read_json(path)
        if not isinstance(results, dict) or not {"runs", "confidence"} <= results.keys():
            continue  # not of an evaluation
        for number, run in enumerate(results["runs"], start=1):
            # Those of a memory for a pretrained model alone are not what is judged.
            if weights is not None and run["model"]["fingerprint"] != weights[:16]:
                continue
            if weights is None and (len(results["runs"]) > 1 or source != folder):
                continue
            for name, task in run["tasks"].items():
                if name in seen:
                    continue
                seen.add(name)
                kinds = (f"depths_{number}", "curves", "losses")
                pictures = [path.with_name(f"{name}_{kind}.png") for kind in kinds]
                there = [picture for picture in pictures if picture.is_file()]
                words = {k: task[k] for k in ("title", "description", "metric", "kind", "scores")}
                confidence, picture = results["confidence"], there[0] if there else None
                yield TaskScores(name, **words, confidence=confidence, picture=picture)
