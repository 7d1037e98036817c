"""Evaluation during training: what it measures, and where it is written."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from memlm.errors import UserError
from memlm.memory.query_norm import average_running_statistics
from memlm.training.held_out import HeldOut
from memlm.training.logs import RunLog
from memlm.training.loss import RowLoss, total
from memlm.training.usage import held_out_usage


class Evaluation:
    """What a run measures now and then.

    Args:
        row_loss: the model's loss, without a data-parallel wrapper.
        held_out: the rows it is measured on; None = none.
        accelerator: the processes; `held_out_loss` and `run` are collective.
    """

    def __init__(self, row_loss: RowLoss, held_out: HeldOut | None, accelerator: Accelerator):
        self.row_loss, self.model = row_loss, row_loss.model
        self.held_out, self.accelerator = held_out, accelerator

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
        """Measure after `step`, and write it to the log and the trackers.

        Returns:
            The loss on the held-out rows with the memory; None without such rows.
        """
        if self.held_out is None:
            return None
        average_statistics(self.model, self.accelerator)
        with held_out_usage(self.model, self.accelerator) as usage:
            result = self.held_out_loss()
        log.record({"step": step, "evaluation": True, **result, **usage})
        losses = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
        log.line(f"held-out after step {step}: {losses}")
        track({"step": step} | {f"held_out/{k}": v for k, v in result.items()})
        return result


def average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Give evaluation and checkpoints the running statistics of all processes' tokens."""
    processes = accelerator.num_processes
    if processes > 1:
        average_running_statistics(model, lambda mine: total(mine, accelerator) / processes)
