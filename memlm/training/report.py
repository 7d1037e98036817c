"""What a run says of its steps: when a line is due, what stands in it, and who else is told."""

import dataclasses
from typing import Any

from accelerate import Accelerator
from torch import nn

from memlm.config import TrainConfig
from memlm.training.guards import StepGuard
from memlm.training.logs import RunLog
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
        learning_rate: of AdamW and SPAM.
        stage: index of its stage in the curriculum.
    """

    step: int
    made: bool
    loss: float
    grad_norm: float
    bits: dict[str, float]
    seconds: float
    learning_rate: float
    stage: int


class Report:
    """Records, log lines and trackers of the steps of a run.

    Args:
        options: how the model is trained.
        accelerator: its processes; `after_step` is collective on logged steps.
        log: where lines and records go.
        guard: counts the skipped steps.
        updates, usage: what is watched of the memories.
    """

    def __init__(
        self,
        options: TrainConfig,
        accelerator: Accelerator,
        log: RunLog,
        guard: StepGuard,
        updates: UpdateLog,
        usage: UsageLog,
    ):
        self.options, self.accelerator, self.log = options, accelerator, log
        self.guard, self.updates, self.usage = guard, updates, usage
        self.stages = options.stages()

    def after_step(self, result: StepResult) -> None:
        """Tell of a step, where a line is due: at the first, the last, and every log_every-th."""
        options, step = self.options, result.step
        speed = options.tokens_per_step / result.seconds
        self.log.tick(speed)
        last = step == options.steps
        if result.made and step != 1 and step % options.log_every and not last:
            return
        self.updates.check(step)
        stage = self.stages[result.stage]
        metrics = {
            "step": step,
            "loss": result.loss if result.made else None,
            **result.bits,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm if result.made else None,
            "skipped_steps": self.guard.skipped,
            "tokens_per_second": speed,
            "stage": result.stage,
            "length": stage.length,
            "window": stage.window,
            **self.updates.report(),
            **self.usage.report(last=last),
        }
        self.log.record(metrics)
        if result.made:
            self.log.step_line(metrics, len(self.stages))
        self.track(metrics)

    def track(self, metrics: dict[str, Any]) -> None:
        """Give the numbers of a record to the trackers."""
        if self.options.trackers:
            numbers = {key: value for key, value in metrics.items() if value is not None}
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
