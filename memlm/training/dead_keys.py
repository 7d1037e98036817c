"""Half keys of product-key memories that no token chooses any more: they are drawn anew."""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from memlm.errors import UserError
from memlm.training.loss import total
from memlm.training.usage import UsageLog

KEY_READS_FILE = "key_reads.safetensors"


class DeadKeys:
    """Every `every` steps, half keys that were never read in those steps start anew.

    They are drawn from the distribution of the start, their entries in the optimizers' states
    become zero. All others keep every bit. Draws depend on (seed, step, site) alone, so all
    processes draw the same; a resumed run goes on in the middle of a window.

    Args:
        usage: counts the reads, with `half_keys` unless `every` is None.
        optimizers: all of the run; one has moments of the keys.
        every: steps of a window, which end at its multiples; None = nothing is ever drawn anew.
        seed: of the run.

    Raises:
        UserError: when there are no product-key memories to watch.
    """

    def __init__(
        self,
        usage: UsageLog,
        optimizers: Iterable[torch.optim.Optimizer],
        every: int | None,
        seed: int,
    ):
        self.usage, self.optimizers, self.every, self.seed = usage, list(optimizers), every, seed
        self.since = 0  # the step from which on reads are counted
        self.reads: dict[str, Tensor] = {}
        if every is None:
            return
        if not usage.recorders:
            raise UserError(
                "train.reinit_keys_after: the model has no product_key memory; leave it out"
            )
        for site, recorder in usage.recorders.items():
            self.reads[site] = torch.zeros_like(recorder.half_keys, dtype=torch.int64)

    def after_step(self, step: int, last: bool = False) -> list[str]:
        """Take in the reads of a step; at the end of a window, draw anew what was not read.

        Collective at the end of a window.

        Args:
            step: steps done.
            last: whether the run ends here; new keys would have no steps to learn in.

        Returns:
            A line for every site at which half keys were drawn anew.
        """
        self._fold()
        if not self.reads or step % self.every:
            return []
        lines = []
        for site, reads in self._total().items():
            dead = reads == 0
            if not last and self.since + self.every <= step and dead.any():
                self._draw(site, dead, step)
                lines.append(
                    f"step {step}: {site}: {int(dead.sum()):,} of {dead.numel():,} half keys were "
                    f"not read in {self.every} steps and are drawn anew"
                )
            self.reads[site].zero_()
        self.since = step
        return lines

    def _fold(self) -> None:
        """Counts of single steps cannot overflow."""
        for site, reads in self.reads.items():
            recorded = self.usage.recorders[site].half_keys
            reads += recorded
            recorded.zero_()

    def _total(self) -> dict[str, Tensor]:
        """Reads so far of all processes, [heads, 2, num_keys] by site."""
        return {site: total(r, self.usage.accelerator) for site, r in self.reads.items()}

    @torch.no_grad()
    def _draw(self, site: str, dead: Tensor, step: int) -> None:
        memory = self.usage.modules[site]
        keys, bound = memory.keys, memory.key_bound
        # The generator of a CPU knows 32 bits of its seed.
        seed = random.Random(f"{self.seed} {step} {site}").getrandbits(32)
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.empty(keys.shape).uniform_(-bound, bound, generator=generator)
        where = dead[..., None].expand(keys.shape)
        _replace(keys, where, fresh)
        for optimizer in self.optimizers:
            for entry in optimizer.state.get(keys, {}).values():
                if entry.shape == keys.shape:
                    _replace(entry, where, torch.zeros_like(fresh))

    def gathered(self) -> dict[str, Tensor]:
        """The unfinished window for a checkpoint; collective."""
        if not self.reads:
            return {}
        window = {site: reads.cpu() for site, reads in self._total().items()}
        return window | {"since": torch.tensor(self.since)}

    def load(self, folder: Path, step: int) -> None:
        """Go on in the window of a checkpoint after `step` steps.

        Where none was counted, keys are first drawn anew after the first whole window.
        """
        self.since = step
        path = folder / KEY_READS_FILE
        if not self.reads or not path.exists():
            return
        saved = load_file(path)
        # The first process goes on with the reads of all.
        first = self.usage.accelerator.is_main_process
        for site, reads in self.reads.items():
            reads.copy_(saved[site] if first else torch.zeros_like(reads))
        self.since = int(saved["since"])


def save_key_reads(reads: dict[str, Tensor], folder: Path) -> None:
    """Write what `DeadKeys.gathered` gave, if anything was counted."""
    if reads:
        save_file(reads, folder / KEY_READS_FILE)


def _replace(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    """Write whole `values` into a tensor that may be sharded, where `where` is True."""
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        where, values = (
            distribute_tensor(part.to(mesh.device_type), mesh, placements).to_local()
            for part in (where.contiguous(), values)
        )
        tensor = tensor.to_local()
    values = values.to(tensor.device, tensor.dtype)
    tensor.copy_(torch.where(where.to(tensor.device), values, tensor))
