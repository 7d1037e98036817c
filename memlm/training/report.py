"""What a run says of its steps: when a line is due, what stands in it, and who else is told."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from memlm.config import TrainConfig
from memlm.training.guards import StepGuard
from memlm.training.logs import RunLog
from memlm.training.memory_metrics import MemoryMetrics
from memlm.training.throughput import Throughput
from memlm.training.together import on_main
from memlm.training.updates import UpdateLog
from memlm.training.usage import UsageLog


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        step: number of the step, from 1.
        made: False for a step that was skipped.
        loss, grad_norm: of the step.
        bits: mean losses in bits by metric key (see `logs.bits`).
        seconds: that it took.
        data_seconds: of these, waiting for rows.
        learning_rate: of AdamW and SPAM.
        stage: index of its stage in the curriculum.
    """

    step: int
    made: bool
    loss: float
    grad_norm: float
    bits: dict[str, float]
    seconds: float
    data_seconds: float
    learning_rate: float
    stage: int


class Report:
    """Records, log lines and trackers of the steps of a run.

    Args:
        model: the model, without wrappers.
        options: how it is trained.
        accelerator: its processes; `after_step` is collective on logged steps.
        log: where lines and records go.
        guard: counts the skipped steps.
        updates, usage: what is watched of the memories in every step.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainConfig,
        accelerator: Accelerator,
        log: RunLog,
        guard: StepGuard,
        updates: UpdateLog,
        usage: UsageLog,
    ):
        self.options, self.accelerator, self.log = options, accelerator, log
        self.guard, self.updates, self.usage = guard, updates, usage
        self.memories = MemoryMetrics(model, accelerator)
        self.throughput = Throughput(model, options, accelerator)
        self.stages = options.stages()

    def due(self, step: int) -> bool:
        """Whether a step is told of: the first, the last, and every log_every-th."""
        return step in (1, self.options.steps) or step % self.options.log_every == 0

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Take in what the memories do in the forward passes of a step in here."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.updates.watch())
            stack.enter_context(self.usage.watch())
            if self.due(step):
                stack.enter_context(self.memories.watch())
            yield

    def settle(self, step: int, made: bool) -> None:
        """Wait until the device has done all of a step that is told of, before its time is taken:
        telling of it would wait as well."""
        device = self.accelerator.device
        if device.type != "cpu" and self._told(step, made):
            torch.get_device_module(device).synchronize(device)

    def _told(self, step: int, made: bool) -> bool:
        return self.due(step) or not made

    def after_step(self, result: StepResult, last: bool) -> None:
        """Tell of a step, where that is due, it was skipped, or it is the `last` of the run.

        What a memory does in the forward passes is not known of a last step that came as a
        surprise (train.stop_answer_bits).
        """
        self.throughput.step(result.seconds, result.data_seconds)
        started = time.perf_counter()
        self.log.tick(self.options.tokens_per_step / result.seconds)
        if self._told(result.step, result.made) or last:
            self._tell(result, last)
        self.throughput.logged(time.perf_counter() - started)

    def _tell(self, result: StepResult, last: bool) -> None:
        options, step, stage = self.options, result.step, self.stages[result.stage]
        left = 0 if last else options.steps - step
        self.updates.check(step)
        if not result.made:
            self.memories.clear()
        metrics = {
            "step": step,
            "loss": result.loss if result.made else None,
            **result.bits,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm if result.made else None,
            "skipped_steps": self.guard.skipped,
            "stage": result.stage,
            "length": stage.length,
            "window": stage.window,
            **self.throughput.report(stage.length, stage.window, left),
            **self.updates.report(),
            **self.usage.report(last),
            **(self.memories.report() if result.made else {}),
        }
        on_main(self.accelerator, lambda: self.log.record(metrics))
        if result.made:
            self.log.step_line(metrics, len(self.stages), self.throughput.device)
        self.track(metrics)

    def track(self, metrics: dict[str, Any]) -> None:
        """Give the numbers of a record to the trackers."""
        if self.options.trackers:
            numbers = {
                key: value
                for key, value in metrics.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
            self.accelerator.log(numbers, step=numbers.pop("step"))


def opening(
    model: nn.Module, options: TrainConfig, accelerator: Accelerator, length: int, parts: int
) -> str:
    """What is about to be trained, in a line.

    Args:
        model: the model, without wrappers.
        options: how it is trained.
        accelerator: its processes.
        length: tokens per row now.
        parts: micro-batches of a step on each process.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_these = f" ({trained:,} of them trained)" if trained != parameters else ""
    return (
        f"{parameters:,} parameters{of_these}, {options.steps} steps of "
        f"{options.tokens_per_step} tokens ({options.tokens_per_step // length} rows of {length} "
        f"now, {accelerator.num_processes} process(es) x {parts} micro-batch(es)) on "
        f"{accelerator.device}"
    )
