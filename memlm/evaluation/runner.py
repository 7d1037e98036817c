"""One evaluation from beginning to end: check, run what is not done, sum up, write the files."""

import dataclasses
import hashlib
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memlm.data.config import parse_generator
from memlm.data.sources import find_files
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.costs import Meter, PeakMemory
from memlm.evaluation.ledger import Batch, Done, Ledger
from memlm.evaluation.loading import check_tokenizer, make_subject
from memlm.evaluation.processes import Alone
from memlm.evaluation.results import check_output, write_results
from memlm.evaluation.statistics import CONFIDENCE, Estimate
from memlm.evaluation.subject import Subject
from memlm.evaluation.summary import summarise
from memlm.evaluation.tasks import expand_tasks, make_task
from memlm.evaluation.tasks.base import Setting, Task, Tools
from memlm.files import file_hash
from memlm.fingerprint import fingerprint


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    output_dir: str | Path | None = None,
    command: str | None = None,
    name: str = "model",
    progress: bool = True,
) -> dict[str, Any]:
    """Run the tasks of `config` on one model; see `evaluate_subjects`.

    Args:
        model: a MemLMForCausalLM, one with an attached memory, or another causal LM of
            transformers; its training mode is restored at the end.
        tokenizer: what it was trained with.
        config, output_dir, command, progress: as in `evaluate_subjects`.
        name: what the report calls the model.
    """
    config.validate()
    training = model.training
    model.eval()
    try:
        subject = make_subject(model, tokenizer, config, name)
        return evaluate_subjects([subject], config, output_dir, command, progress)
    finally:
        model.train(training)


def evaluate_subjects(
    subjects: Sequence[Subject],
    config: EvaluationConfig,
    output_dir: str | Path | None = None,
    command: str | None = None,
    progress: bool = True,
    processes: Alone | None = None,
) -> dict[str, Any]:
    """Run the tasks of `config` on models, and write what they found.

    An evaluation that was stopped goes on where it stood when it is started again with the same
    output folder.

    Args:
        subjects: models in evaluation mode with different names.
        config: the tasks and their sizes.
        output_dir: folder for records, results.json, PNGs and report.html; None = nothing is
            written. A folder that holds results is never overwritten.
        command: the command that repeats this evaluation, for the report.
        progress: show a bar on stderr.
        processes: those that share the batches; all of them return the results. None = this one
            does everything.

    Returns:
        What results.json holds: {"runs": [{"model", "conditions", "notes", "tasks": {task: see
        `summarise`}, "ruler"}], "comparisons": see `compare_runs`, "command", "config",
        "confidence", "seconds", "hashes", "versions"}.

    Raises:
        UserError: for anything the user can change, before a prompt is read.
    """
    config.validate()
    processes = processes or Alone()
    if processes.main:
        check_output(output_dir)
    tasks = [_make_tasks(subject, subjects, config) for subject in subjects]
    for subject, own in zip(subjects, tasks, strict=True):
        check_tasks(subject, own)
    models = [_describe(subject) for subject in subjects]
    inputs = input_hashes(config)
    identity = {
        "config": dataclasses.asdict(config),
        "models": models,
        "distance": _distance(subjects),
        "inputs": inputs,
        "versions": {name: value for name, value in versions().items() if name != "platform"},
    }
    folder = None if output_dir is None else Path(output_dir)
    ledger = Ledger(folder, identity, processes.number)
    # Nobody writes before everybody has read what is done.
    processes.wait()
    try:
        _run(subjects, tasks, config, ledger, processes, progress)
    finally:
        ledger.close()
    gathered = processes.gather(list(ledger.done.values()))
    by_key = {one.batch.key: one for part in gathered for one in part}
    done = [by_key[batch.key] for batch in all_batches(tasks, config)]
    results = _plain(
        _results(subjects, models, tasks, done)
        | {
            "command": command,
            "config": dataclasses.asdict(config),
            "confidence": CONFIDENCE,
            "seconds": round(sum(one.costs["total_seconds"] for one in done), 2),
            "hashes": inputs,
            "versions": versions(),
        }
    )
    if folder is not None and processes.main:
        write_results(results, folder)
    processes.wait()
    return results


def _make_tasks(
    subject: Subject, subjects: Sequence[Subject], config: EvaluationConfig
) -> list[Task]:
    """The tasks for one model; all models hide things out of everyone's reach."""
    tools = Tools(config, subject.tokenizer, _distance(subjects))
    return [make_task(name, tools) for name in expand_tasks(config.tasks)]


def _distance(subjects: Sequence[Subject]) -> int:
    """Tokens that things are hidden away: as far as any model's attention reaches that ends."""
    return max(subject.plan.attention_reach or 0 for subject in subjects)


def check_tasks(subject: Subject, tasks: Sequence[Task]) -> None:
    """Raise UserError when a task does not fit the model or its tokenizer."""
    check_tokenizer(subject)
    limit = subject.max_context
    for task in tasks:
        longest = max(setting.tokens for setting in task.settings())
        if limit is not None and longest > limit:
            raise UserError(
                f"{task.name}: a prompt of {longest} tokens is longer than the full attention of "
                f"{subject.name} allows ({limit}); prompts are never cut, choose shorter ones"
            )


def all_batches(tasks: Sequence[Sequence[Task]], config: EvaluationConfig) -> list[Batch]:
    """Everything there is to run, in order."""
    return [
        Batch(number, task.name, setting.label, rows.start, rows.stop)
        for number, own in enumerate(tasks)
        for task in own
        for setting in task.settings()
        for rows in batches(setting.trials, config.batch_size)
    ]


def batches(count: int, size: int) -> list[range]:
    """Ranges that cover `count` rows in few batches of about `size`, evenly filled.

    Swapping needs a second row: no batch has a single one, so with a size of two some have three.
    """
    number = max(1, min(-(-count // size), count // 2))
    return [
        range(count * index // number, count * (index + 1) // number) for index in range(number)
    ]


@torch.inference_mode()
def _run(
    subjects: Sequence[Subject],
    tasks: Sequence[Sequence[Task]],
    config: EvaluationConfig,
    ledger: Ledger,
    processes: Alone,
    progress: bool,
) -> None:
    """Run this process's share of the batches that are not done."""
    batches_left = processes.share(
        [batch for batch in all_batches(tasks, config) if batch.key not in ledger.done]
    )
    by_name = [{task.name: task for task in own} for own in tasks]

    def tokens(batch: Batch) -> int:
        task = by_name[batch.subject][batch.task]
        setting = _setting(task, batch)
        passes = task.passes(subjects[batch.subject].plan)
        return passes * setting.tokens * (batch.last - batch.first)

    total = sum(map(tokens, batches_left))
    disable = not (progress and processes.main)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=disable) as bar:
        for batch in batches_left:
            subject, task = subjects[batch.subject], by_name[batch.subject][batch.task]
            bar.set_description(f"{subject.name}, {task.name}, {batch.setting}")
            before = bar.n
            ledger.add(_run_batch(batch, subject, task, bar))
            # Prompts that are shorter than their setting says leave a rest.
            bar.update(before + tokens(batch) - bar.n)


def _setting(task: Task, batch: Batch) -> Setting:
    return next(setting for setting in task.settings() if setting.label == batch.setting)


def _run_batch(batch: Batch, subject: Subject, task: Task, bar: tqdm) -> Done:
    start, peak = time.perf_counter(), PeakMemory(subject.device)
    meter = Meter(bar, subject.device)
    rows = range(batch.first, batch.last)
    try:
        records = task.run(_setting(task, batch), rows, subject, meter)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{task.name}: {subject.name} has no memory left on {device_name(subject.device)} for "
            f"{len(rows)} rows of {batch.setting}; use a smaller batch_size or segment (and "
            "another output folder)"
        ) from error
    costs = meter.costs() | {
        "peak_memory_bytes": peak.bytes(),
        "total_seconds": time.perf_counter() - start,
    }
    return Done(batch, records, costs)


def _results(
    subjects: Sequence[Subject],
    models: Sequence[dict[str, Any]],
    tasks: Sequence[Sequence[Task]],
    done: Sequence[Done],
) -> dict[str, Any]:
    from memlm.evaluation.comparison import compare_runs
    from memlm.evaluation.ruler_average import ruler_averages

    runs, records = [], []
    for number, (subject, own) in enumerate(zip(subjects, tasks, strict=True)):
        mine = [one for one in done if one.batch.subject == number]
        found: dict[str, Any] = {}
        for task in own:
            parts = [one for one in mine if one.batch.task == task.name]
            found[task.name] = summarise(task, parts) | {
                "seconds": round(sum(one.costs["total_seconds"] for one in parts), 2)
            }
        runs.append(
            {
                # Not what the numbers depend on, so it may change while they are gathered.
                "model": models[number] | {"device": device_name(subject.device)},
                "conditions": list(subject.plan.conditions),
                "notes": list(subject.plan.notes),
                "tasks": found,
                "ruler": ruler_averages(_plain(found)),
            }
        )
        records.append(
            {
                task.name: [
                    record for one in mine if one.batch.task == task.name for record in one.records
                ]
                for task in own
            }
        )
    return {"runs": runs, "comparisons": compare_runs(_plain(runs), records)}


def _describe(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "source": subject.source,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "attention_reach_tokens": subject.plan.attention_reach,
        "fingerprint": fingerprint(subject.model.state_dict())[:16],
        "configuration": configuration_hash(subject.model),
        "tokenizer": subject.tokenizer_source,
        "vocabulary": tokenizer_hash(subject.tokenizer),
    }


def configuration_hash(model: nn.Module) -> str:
    """SHA-256 of what no weight tells, windows and the like, 16 hexadecimal digits."""
    attached = getattr(model, "attachment", None)
    parts = [model.config] if attached is None else [model.config, attached.config, attached.window]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The name of a GPU; otherwise the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, 16 hexadecimal digits."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def input_hashes(config: EvaluationConfig) -> dict[str, str]:
    """SHA-256 of every file that the config names, by path, 16 hexadecimal digits."""
    entries = [*config.haystack, *config.perplexity.files]
    named = [config.ruler.squad, config.ruler.hotpotqa, config.retention.facts]
    named += dataclasses.astuple(config.recall_completion)
    entries += [entry for entry in named if Path(entry).is_file()]
    paths = find_files(entries) if entries else []
    if config.babilong.stories is not None:
        paths += sorted(Path(config.babilong.stories).expanduser().glob("*.txt"))
    if config.scbench.data is not None:
        paths += sorted(Path(config.scbench.data).expanduser().glob("scbench_*.jsonl"))
    longbench = Path(config.longbench.data).expanduser()
    if longbench.is_dir():
        paths += sorted(longbench.glob("*.jsonl"))
    for name, options in config.synthetic.options.items():
        paths += parse_generator(name, options, f"synthetic.options.{name}").input_files()
    return {str(path): file_hash(path)[:16] for path in paths}


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
