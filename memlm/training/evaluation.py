"""Evaluation during training: what it measures, and where it is written.

It leaves training as it is: a run that measures and one that does not have the same losses, to the
last bit.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.config import ALL_CONDITIONS, EvaluationConfig
from memlm.evaluation.costs import Meter
from memlm.evaluation.runner import batches, check_tasks
from memlm.evaluation.subject import MemorySubject
from memlm.evaluation.tasks import expand_tasks, make_task
from memlm.evaluation.tasks.base import PromptTask, Setting, Task, Tools
from memlm.memory.query_norm import average_running_statistics
from memlm.training.held_out import HeldOut
from memlm.training.logs import RunLog
from memlm.training.loss import RowLoss, total
from memlm.training.row_shares import whole_rows
from memlm.training.together import on_each, on_main
from memlm.training.usage import held_out_usage

_SOURCE = re.compile("source/(.*)/bits")


class Evaluation:
    """What a run measures now and then: the loss on held-out rows, and tasks.

    Args:
        row_loss: the model's loss, without a data-parallel wrapper.
        tokenizer: what the model is trained with.
        held_out: the rows that the loss is measured on; None = none.
        options: with the tasks.
        accelerator: the processes; `held_out_loss` and `run` are collective.

    Raises:
        UserError: for tasks that do not fit the model or its tokenizer.
    """

    def __init__(
        self,
        row_loss: RowLoss,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut | None,
        options: TrainConfig,
        accelerator: Accelerator,
    ):
        self.row_loss, self.model = row_loss, row_loss.model
        self.held_out, self.accelerator = held_out, accelerator
        self.tasks = None
        if options.evaluate_during is not None:
            self.tasks = on_each(
                accelerator, lambda: TrainingTasks(row_loss, tokenizer, options, accelerator)
            )
        self._latest: tuple[int, dict[str, float] | None] | None = None

    def held_out_loss(self, use_memory: bool = True) -> dict[str, float]:
        """Loss on the held-out rows; see `HeldOut.evaluate`.

        Raises:
            UserError: when train.evaluation_rows is 0.
        """
        if self.held_out is None:
            raise UserError("train.evaluation_rows is 0: there is nothing to evaluate on")
        return self.held_out.evaluate(self.row_loss, use_memory)

    def run(
        self, step: int, log: RunLog, track: Callable[[dict[str, Any]], None]
    ) -> dict[str, float] | None:
        """Measure after `step`, and write it to the log and the trackers; once per step.

        Returns:
            The loss on the held-out rows with the memory; None without such rows.
        """
        if self._latest is None or self._latest[0] != step:
            self._latest = (step, self._run(step, log, track))
        return self._latest[1]

    def _run(
        self, step: int, log: RunLog, track: Callable[[dict[str, Any]], None]
    ) -> dict[str, float] | None:
        if self.held_out is None and self.tasks is None:
            return None
        started = time.perf_counter()
        result, usage, scores, said = None, {}, {}, []
        with unchanged(self.model, self.accelerator):
            if self.held_out is not None:
                with held_out_usage(self.model, self.accelerator) as usage:
                    result = self.held_out_loss()
                without = self.held_out_loss(use_memory=False) if self.model.memories() else None
                said.append(_losses_line(result, without))
            if self.tasks is not None:
                scores = self.tasks.run()
                said.append(self.tasks.line(scores))
        losses = {} if result is None else result | _without_memory(result, without)
        record = {"step": step, "evaluation": True, **losses, **usage, **scores}
        on_main(self.accelerator, lambda: log.record(record))
        seconds = time.perf_counter() - started
        log.line(f"held-out after step {step}: {'  '.join(said)}  ({seconds:.1f} s)")
        track({"step": step, **{f"held_out/{key}": v for key, v in losses.items()}, **scores})
        return result


def _without_memory(result: dict[str, float], without: dict[str, float] | None) -> dict[str, float]:
    """`NAME_off` by the losses without memory, and bits_difference, what the memory saves."""
    if without is None:
        return {}
    found = {f"{name}_off": value for name, value in without.items()}
    return found | {"bits_difference": without["bits"] - result["bits"]}


def _losses_line(result: dict[str, float], without: dict[str, float] | None) -> str:
    named = ((_SOURCE.sub(r"\1", name), value) for name, value in result.items())
    losses = "  ".join(f"{name} {value:.3f}" for name, value in named)
    if without is None:
        return losses
    return f"{losses}  memory off {without['bits']:.3f} ({without['bits'] - result['bits']:+.3f})"


class TrainingTasks:
    """The tasks of `train.evaluate_during`; prompts are the same at every step.

    Args:
        row_loss: the loss of the model that is trained, without a data-parallel wrapper.
        tokenizer: what it is trained with.
        options: with the tasks.
        accelerator: the processes. They share the prompts, unless they hold tables or, under FSDP2,
            all weights together: those answer only when all of them read the same.

    Raises:
        UserError: for tasks that do not fit.
    """

    def __init__(
        self,
        row_loss: RowLoss,
        tokenizer: PreTrainedTokenizerBase,
        options: TrainConfig,
        accelerator: Accelerator,
    ):
        model = row_loss.model
        self.model, self.accelerator = model, accelerator
        self.together = options.memory_parallel > 1 or accelerator.is_fsdp2
        try:
            self.config = EvaluationConfig.from_dict(options.during())
            self.config.validate()
            self.subject = _TrainedSubject(
                model, tokenizer, make_plan(model, self.config.conditions), self.config.segment
            )
            self.subject.broadcasts = self.together
            self.subject.call_model = row_loss.call_model
            tools = Tools(self.config, tokenizer, self.subject.plan.attention_reach or 0)
            self.tasks = [make_task(name, tools) for name in expand_tasks(self.config.tasks)]
            check_tasks(self.subject, self.tasks)
            for task in self.tasks:
                if isinstance(task, PromptTask):  # what a text lacks shows at its first prompt
                    task.trial(min(self.config.all_lengths), 0)
        except UserError as error:
            raise UserError(f"train.evaluate_during: {error}") from error

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """The mean score of every task and setting in every condition; collective.

        Returns:
            `TASK/SETTING/CONDITION`: between 0 and 1, or a loss in the task's unit.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with self.accelerator.autocast(), whole_rows(self.model):
                found = [
                    (task.name, record.setting, record.condition, record.trial, record.score)
                    for task, setting, rows in self._share()
                    for record in task.run(setting, rows, self.subject, Meter())
                ]
        finally:
            for module, training in modes.items():
                module.training = training
        if self.accelerator.num_processes > 1 and not self.together:
            found = gather_object(found)
        scores: dict[str, list[float]] = {}
        for name, setting, condition, _, score in sorted(found, key=self._place):
            scores.setdefault(f"{name}/{setting}/{condition}", []).append(score)
        return {key: sum(values) / len(values) for key, values in scores.items()}

    def _share(self) -> list[tuple[Task, Setting, range]]:
        """This process's batches."""
        number = 1 if self.together else self.accelerator.num_processes
        work = [
            (task, setting, rows)
            for task in self.tasks
            for setting in task.settings()
            for rows in batches(
                setting.trials, min(self.config.batch_size, -(-setting.trials // number))
            )
        ]
        return work if self.together else work[self.accelerator.process_index :: number]

    def _place(self, record: tuple[str, str, str, int, float]) -> tuple[int, int, int, int]:
        name, setting, condition, trial, _ = record
        number = [task.name for task in self.tasks].index(name)
        labels = self.tasks[number].labels()
        return number, labels.index(setting), ALL_CONDITIONS.index(condition), trial

    def line(self, scores: dict[str, float]) -> str:
        """The scores, readable: shares in percent, of losses the one over all positions."""
        kinds = {task.name: task.kind for task in self.tasks}
        parts: dict[str, list[str]] = {}
        for key, score in scores.items():
            name, setting, condition = key.split("/")
            if kinds[name] != "losses":
                said = f"{condition} {100 * score:.0f} %"
            elif setting == "all":
                said = f"{condition} {score:.3f}"
            else:
                continue
            parts.setdefault(f"{name} {setting}", []).append(said)
        return "  ".join(f"{name}: {', '.join(said)}" for name, said in parts.items())


class _TrainedSubject(MemorySubject):
    """A model whose processes may have to stay together: all of them go on with the same token.

    Attributes:
        broadcasts: whether they have to.
    """

    broadcasts = False

    def step(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        logits, states = super().step(tokens, mask, states, use_memory)
        # Not equal to the last bit on all of them, and one that ends early would leave the others.
        return broadcast(logits) if self.broadcasts else logits, states


@contextlib.contextmanager
def unchanged(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Evaluation inside has the running statistics of all processes' tokens.

    Afterwards they and the random numbers are what they were.
    """
    device = accelerator.device
    statistics = {
        buffer: buffer.clone() for name, buffer in model.named_buffers() if "running_" in name
    }
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        average_statistics(model, accelerator)
        try:
            yield
        finally:
            for buffer, before in statistics.items():
                buffer.copy_(before)


def average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Give evaluation and checkpoints the running statistics of all processes' tokens."""
    processes = accelerator.num_processes
    if processes > 1:
        average_running_statistics(model, lambda mine: total(mine, accelerator) / processes)
