"""The updates of memories that learn while they read, during training: counted, logged, judged."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from memlm.errors import DivergedError
from memlm.memory.records import count_updates
from memlm.training.loss import total


class UpdateLog:
    """Counts of every neural memory of `model` since they were last reported.

    Args:
        model: the model.
        accelerator: its processes; `report` and `check` are collective.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.model, self.accelerator = model, accelerator
        self.counts: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Count what the memories do in here."""
        with count_updates(self.model) as updates:
            yield
        for name, found in updates.items():
            site = name.removeprefix("model.").removesuffix(".module.memory")
            sums = found.read(self.accelerator.device)
            self.counts[site] = self.counts.get(site, torch.zeros_like(sums)) + sums

    def _total(self) -> dict[str, list[float]]:
        if not self.counts:
            return {}
        sums = total(torch.stack(list(self.counts.values())).double(), self.accelerator)
        return dict(zip(self.counts, sums.tolist(), strict=True))

    def check(self, step: int) -> None:
        """Raise DivergedError if a memory read or kept what is not finite by `step`."""
        for site, (_, _, broken) in self._total().items():
            if broken:
                raise DivergedError(
                    f"step {step}: the memory of {site} diverged, its weights or what it reads are "
                    f"not finite ({broken:.0f} times); lower its theta_max or chunk_size, or bound "
                    "its gradients with clip"
                )

    def report(self) -> dict[str, float]:
        """The share of clipped updates of each memory, where there are any; counts start anew."""
        shares = {
            f"{site}.clipped": clipped / max(1.0, reads)
            for site, (reads, clipped, _) in self._total().items()
        }
        self.counts = {}
        return shares if any(shares.values()) else {}
