"""How evenly the slots of a table are used. A collapsed memory shows here before the loss tells."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class UsageStatistics:
    """How reads spread over the slots of a table.

    Attributes:
        used: share of the slots that were read at all, 0..1.
        kl_to_uniform: log N + sum p log p in nats, 0 when all slots are used equally.
        gini: Gini coefficient of the mass per slot; 0 = equal, near 1 = a few slots take all.
        top1_mass: share of the mass on the most used 1 % of the slots (at least one slot).
        top10_mass: share of the mass on the most used 10 % of the slots.
    """

    used: float
    kl_to_uniform: float
    gini: float
    top1_mass: float
    top10_mass: float

    @classmethod
    def of(cls, mass: Tensor) -> "UsageStatistics":
        """Statistics of the mass [N] that fell on each slot; all NaN when nothing was read."""
        if not mass.sum() > 0:
            return cls(*[math.nan] * len(dataclasses.fields(cls)))
        count = mass.numel()
        share = (mass.double() / mass.double().sum()).sort().values  # ascending
        ranks = torch.arange(1, count + 1, dtype=torch.float64, device=share.device)

        def top(fraction: float) -> float:
            return float(share[-max(1, round(fraction * count)) :].sum())

        return cls(
            used=float((mass > 0).double().mean()),
            kl_to_uniform=math.log(count) + float(torch.xlogy(share, share).sum()),
            gini=float(((2 * ranks - count - 1) * share).sum() / count),
            top1_mass=top(0.01),
            top10_mass=top(0.1),
        )


class SlotUsage:
    """Counts the reads of every slot, and adds up their weights."""

    def __init__(self, slots: int, device: torch.device | None = None):
        self.counts = torch.zeros(slots, dtype=torch.int64, device=device)
        self.weights = torch.zeros(slots, dtype=torch.float64, device=device)

    @torch.no_grad()
    def record(self, indices: Tensor, weights: Tensor) -> None:
        """Take in reads: `indices` (integer) and `weights`, of one shape."""
        indices = indices.flatten().long()
        self.counts += torch.bincount(indices, minlength=self.counts.numel())
        self.weights.index_add_(0, indices, weights.flatten().double())

    def by_count(self) -> UsageStatistics:
        """Statistics in which every read counts one."""
        return UsageStatistics.of(self.counts)

    def by_weight(self) -> UsageStatistics:
        """Statistics in which every read counts its weight."""
        return UsageStatistics.of(self.weights)


@contextlib.contextmanager
def record_usage(model: nn.Module) -> Iterator[dict[str, SlotUsage]]:
    """Record the reads of every product-key memory of `model`, by module name.

    Padding is left out. Recomputed passes (gradient checkpointing) are counted again.
    """
    recorders = {}
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "usage")}
    for name, module in modules.items():
        recorders[name] = SlotUsage(module.config.num_keys**2, module.keys.device)
        module.usage = recorders[name]
    try:
        yield recorders
    finally:
        for module in modules.values():
            module.usage = None
