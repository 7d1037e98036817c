"""Training and evaluating one cell."""

import contextlib
import dataclasses
import gc
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from memlm.config import RunConfig
from memlm.errors import DivergedError, UserError
from memlm.evaluation.runner import evaluate
from memlm.evaluation.suite.cells import Cell
from memlm.training.retention import complete_checkpoints
from memlm.training.trainer import Trainer


def run_cell(cell: Cell, folder: Path, plot: bool = False) -> dict[str, Any]:
    """Train the model of a cell, from the newest checkpoint in its folder on, and evaluate it.

    What comes out depends on the cell alone: not on what this process did before, and not on
    whether the training was interrupted.

    Args:
        cell: the cell.
        folder: its run folder. What the run says goes into FOLDER.log beside.
        plot: draw the run's curves in its folder.

    Returns:
        {"key", "task", "memory", "width", "learning_rate", "seed", "parameters",
        "flops_per_token", "state_bytes": {setting: bytes of a row}, "memory_state_bytes",
        "scores": {evaluation task: {setting: {condition: number}}}, "measures": {evaluation task:
        the task's own}, "held_out": losses after training, "steps", "seconds" of training,
        "evaluation_seconds", "error": None, or why there are no scores}.

    Raises:
        UserError: for data or sizes that do not fit; a training that diverges, or for which there
            is not enough memory, is a result.
    """
    train = dataclasses.replace(cell.config.train, output_dir=str(folder))
    config = dataclasses.replace(cell.config, train=train)
    resume = "auto" if complete_checkpoints(folder) else False
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _output_in(folder.with_name(f"{folder.name}.log")), _fresh_accelerator():
        return _run(cell, config, resume, plot)


def _run(cell: Cell, config: RunConfig, resume: bool | str, plot: bool) -> dict[str, Any]:
    found = cell.place | {
        "parameters": cell.parameters,
        "flops_per_token": cell.flops_per_token,
        "state_bytes": {},
        "memory_state_bytes": {},
        "scores": {},
        "measures": {},
        "held_out": {},
        "steps": 0,
        "seconds": 0.0,
        "evaluation_seconds": 0.0,
        "error": None,
    }
    trainer = None
    try:
        trainer = Trainer(config, resume)
        length = config.train.stages()[-1].length
        found["parameters"] = sum(one.numel() for one in trainer.model.parameters())
        found["flops_per_token"] = trainer.model.flops(length) // length
        found["held_out"] = trainer.run(plot=plot).after or {}
        started = time.perf_counter()
        evaluation = evaluate(trainer.model, trainer.tokenizer, config.evaluate, progress=False)
        found["evaluation_seconds"] = round(time.perf_counter() - started, 2)
        found |= _numbers(evaluation["runs"][0]["tasks"])
    except (DivergedError, torch.OutOfMemoryError, UserError) as error:
        memory = isinstance(error.__cause__ or error, torch.OutOfMemoryError)
        if not memory and not isinstance(error, DivergedError):
            raise
        found["error"] = "no memory left on the device" if memory else str(error)
    if trainer is not None:
        found |= {"steps": trainer.step, "seconds": round(trainer.seconds, 2)}
    return {"key": cell.key} | _finite(found)


def _numbers(tasks: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of its evaluation."""
    found: dict[str, Any] = {"scores": {}, "measures": {}}
    sizes: dict[str, dict[str, int]] = {"state_bytes": {}, "memory_state_bytes": {}}
    for name, task in tasks.items():
        found["scores"][name] = {
            setting: {condition: score["value"] for condition, score in scores.items()}
            for setting, scores in task["scores"].items()
        }
        if task.get("measures"):
            found["measures"][name] = task["measures"]
        for setting, cost in task["cost"].items():
            for size, values in sizes.items():
                values[setting] = max(cost[size], values.get(setting, 0))
    return found | sizes


@contextlib.contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Have what is printed in a file."""
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


@contextlib.contextmanager
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state, the precision included, for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()


def _finite(value: Any) -> Any:
    """As JSON holds it: a number that is not finite is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
