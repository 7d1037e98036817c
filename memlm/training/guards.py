"""Steps whose loss or gradient is not finite: they change nothing, are counted, and end a run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memlm.errors import DivergedError
from memlm.files import discard, write_folder
from memlm.training.lanes import Lanes
from memlm.training.loss import Batch
from memlm.training.retention import by_step
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.row_shares import RowShares
from memlm.training.together import on_main
from memlm.training.updates import UpdateLog
from memlm.training.usage import UsageLog

SKIPPED_FOLDER = "skipped"
KEPT_BATCHES = 8  # the latest; a batch that fails again and again need not fill a disk


class StepGuard:
    """Counts the steps that are skipped and keeps their batches.

    Loss and gradient norm are sums over all processes, so all come to the same decision.

    Args:
        model: the model, without wrappers.
        optimizers: all of the run.
        accelerator: its processes.
        folder: the run folder.
        limit: most skipped steps in a row; one more ends the run.
        shares: how the processes share rows.

    Attributes:
        skipped: steps skipped so far, of earlier parts of a resumed run too.
        in_a_row: those since the last step that was made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        accelerator: Accelerator,
        folder: Path,
        limit: int,
        shares: RowShares,
    ):
        self.model, self.optimizers, self.accelerator = model, optimizers, accelerator
        self.folder, self.limit, self.shares = folder / SKIPPED_FOLDER, limit, shares
        self.skipped = self.in_a_row = 0

    def remember(self, lanes: Lanes, updates: UpdateLog, usage: UsageLog) -> Callable[[], None]:
        """Note what the forward passes of a step change, before they do.

        Returns:
            Puts the carried states, the buffers (running statistics) and the counts of the
            memories' updates and reads back.
        """
        forget_reads = usage.remember()
        states, counts = list(lanes.states), dict(updates.counts)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def undo() -> None:
            lanes.states, updates.counts = states, counts
            forget_reads()
            for buffer, value in buffers:
                buffer.copy_(value)

        return undo

    def passes(self, loss: float, grad_norm: float) -> bool:
        """Whether a step can be made; if so, a row of skipped ones is over."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.in_a_row = 0
        return finite

    def skip(
        self, step: int, batch: Batch, loss: float, grad_norm: float, updates: UpdateLog
    ) -> str:
        """Count a step that cannot be made and keep its batch; collective.

        Args:
            step: number of the step, from 1.
            batch: this process's rows.
            loss, grad_norm: of the step.
            updates: says whether a memory that learns while it reads is the cause.

        Returns:
            A line for the log.

        Raises:
            DivergedError: on every process, when there were too many in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        parts = gather_object([batch] if self.shares.first else [])
        found = gather_object([_broken_gradients(self.model, self.optimizers)])
        record = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "parameters": sorted({name for names in found for name in names}),
        }
        place = self.folder / f"step_{step:06d}"
        on_main(self.accelerator, lambda: self._keep(place, parts, record))
        said = f"step {step}: the loss is {loss} and the gradient norm {grad_norm}"
        if self.in_a_row <= self.limit:
            return (
                f"{said}: skipped ({self.in_a_row} in a row, {self.skipped} in all); its rows are "
                f"in {place}"
            )
        updates.check(step)
        more = self.in_a_row - 1
        before = f", after {more} skipped step{'s'[: more != 1]}" if more else ""
        raise DivergedError(
            f"{said}{before}; lower train.learning_rate, or raise train.warmup_steps; the rows of "
            f"the step are in {place}"
        )

    def _keep(self, place: Path, parts: list[Batch], record: dict) -> None:
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        def write(folder: Path) -> None:
            save_file(rows, folder / "batch.safetensors")
            (folder / "step.json").write_text(json.dumps(record, indent=2), encoding="utf-8")

        write_folder(place, write)
        for old in by_step(self.folder)[:-KEPT_BATCHES]:
            discard(old)


def _broken_gradients(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Names of the parameters of which this process has gradients that are not finite."""
    gradients: dict[str, list[Tensor]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = [parameter.grad]
    for optimizer in optimizers:
        if isinstance(optimizer, RowOptimizer):
            for table in optimizer.tables:
                reads = [read.grad for read in table.pending.reads]
                gradients[names[id(table.weight)]] = reads
    return [name for name, parts in gradients.items() if not all(map(_finite, parts))]


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())
