"""One evaluation from beginning to end: check, run the tasks, write the files."""

import dataclasses
import json
import math
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memlm.errors import UserError
from memlm.evaluation.conditions import Plan, make_plan
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.statistics import CONFIDENCE, Estimate
from memlm.evaluation.tasks import mqar, needle, perplexity
from memlm.evaluation.tasks.base import Meter

TASKS: dict[str, ModuleType] = {"needle": needle, "mqar": mqar, "perplexity": perplexity}
RESULTS = "results.json"


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    output_dir: str | Path | None = None,
    command: str | None = None,
    name: str = "model",
    progress: bool = True,
) -> dict[str, Any]:
    """Run the tasks of `config` on a model and write what they found.

    Args:
        model: a MemLMForCausalLM; its training mode is restored at the end.
        tokenizer: what it was trained with.
        config: the tasks and their sizes.
        output_dir: folder for results.json, PNGs and report.html, created when everything is
            done; None = nothing is written. A folder that holds results is never overwritten.
        command: the command that repeats this evaluation, for the report.
        name: what the report calls the model.
        progress: show a bar on stderr.

    Returns:
        What results.json holds: {"versions", "command", "model", "config", "conditions",
        "notes", "tasks": {task: {"metric", "axis", "scores": {setting: {condition: {"value",
        "low", "high", "count"}}}, "memory_gain", "cost", "seconds", ...}}, "seconds"}.

    Raises:
        UserError: for anything the user can change, before a file is written.
    """
    config.validate()
    check_output(output_dir)
    plan = make_plan(model)
    check_tasks(model, tokenizer, config, plan)
    start = time.perf_counter()
    training = model.training
    model.eval()
    try:
        tasks = _run_tasks(model, tokenizer, config, plan, progress)
    finally:
        model.train(training)
    results = {
        "model": {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention_reach_tokens": plan.attention_reach,
        },
        "command": command,
        "config": dataclasses.asdict(config),
        "conditions": list(plan.conditions),
        "notes": list(plan.notes),
        "confidence": CONFIDENCE,
        "tasks": tasks,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
    }
    if output_dir is not None:
        write_results(results, Path(output_dir))
    return results


def check_output(output_dir: str | Path | None) -> None:
    """Raise UserError when results would be overwritten or the folder cannot be one."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    if (folder / RESULTS).exists():
        raise UserError(f"output: {folder} already holds {RESULTS}; choose another folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output: {folder} cannot be written ({existing} is no writable folder)")


def check_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, plan: Plan
) -> None:
    """Raise UserError when a task does not fit the model or the tokenizer."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens, the model knows "
            f"{model.config.vocab_size}; give the one the model was trained with"
        )
    for name in config.tasks:
        length, limit = TASKS[name].longest(config), model.max_context
        if limit is not None and length > limit:
            raise UserError(
                f"{name}: a prompt of {length} tokens is longer than this model's full attention "
                f"allows ({limit})"
            )
        TASKS[name].check(model, tokenizer, config, plan)


@torch.inference_mode()
def _run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    plan: Plan,
    progress: bool,
) -> dict[str, Any]:
    found = {}
    total = sum(TASKS[name].tokens(config, plan) for name in config.tasks)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
        for name in config.tasks:
            bar.set_description(name)
            start = time.perf_counter()
            result = TASKS[name].run(model, tokenizer, config, plan, Meter(bar))
            values = _plain(result)
            details = values.pop("details")
            found[name] = values | details | {"seconds": round(time.perf_counter() - start, 2)}
        # Short documents leave a rest of the estimate.
        bar.update(bar.total - bar.n)
    return found


def _plain(value: Any) -> Any:
    """As JSON holds it; an unknown bound is null."""
    if isinstance(value, Estimate) or dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    """Versions of everything a number may depend on."""
    import memlm

    return {
        "memlm": memlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, the plots and report.html into `folder`.

    They are made in a hidden folder beside and moved at the end, results.json last: a folder with
    results.json is complete.
    """
    from memlm.evaluation.plots import draw_plots
    from memlm.evaluation.report import render_report

    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".evaluation-", dir=folder))
    try:
        light, dark = draw_plots(results), draw_plots(results, dark=True)
        for name, image in light.items():
            (made / name).write_bytes(image)
        (made / "report.html").write_text(render_report(results, light, dark), encoding="utf-8")
        names = [*light, "report.html", RESULTS]
        (made / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for name in names:
            (made / name).replace(folder / name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
