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
        share = mass.sort().values.double()  # ascending
        share /= share.sum()
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
    """Counts the reads of every slot, on the device that makes them and without waiting for it.

    Args:
        slots: of the table.
        device: where the memory computes.
        weighted: also add up the weights of the reads.
        half_keys: heads and half keys per list, to count the reads of every half key too.

    Attributes:
        counts: int32 [slots].
        weights: float32 [slots], or None.
        half_keys: int32 [heads, 2, num_keys], or None.
        reads: all reads so far.
    """

    def __init__(
        self,
        slots: int,
        device: torch.device | None = None,
        weighted: bool = True,
        half_keys: tuple[int, int] | None = None,
    ):
        self.counts = torch.zeros(slots, dtype=torch.int32, device=device)
        self.weights = torch.zeros(slots, device=device) if weighted else None
        self.half_keys, self.reads = None, 0
        self._one = torch.ones((), dtype=torch.int32, device=device)
        if half_keys is not None:
            heads, num_keys = half_keys
            self.half_keys = torch.zeros(heads, 2, num_keys, dtype=torch.int32, device=device)
            first = torch.arange(heads, dtype=torch.int32, device=device) * (2 * num_keys)
            self._first = first[:, None]  # where a head's half keys begin

    @torch.no_grad()
    def record(self, indices: Tensor, weights: Tensor) -> None:
        """Take in reads: `indices` int32 and `weights`, both [T, H, k]."""
        self.reads += indices.numel()
        ones = self._one.expand(indices.numel())
        self.counts.index_add_(0, indices.flatten(), ones)
        if self.weights is not None:
            self.weights.index_add_(0, indices.flatten(), weights.flatten().to(self.weights.dtype))
        if self.half_keys is not None:
            num_keys = self.half_keys.shape[-1]
            half = torch.div(indices, num_keys, rounding_mode="floor")
            flat = self.half_keys.view(-1)
            flat.index_add_(0, (half + self._first).flatten(), ones)
            half = indices - half * num_keys + num_keys
            flat.index_add_(0, (half + self._first).flatten(), ones)

    def clear(self) -> None:
        """Count the slots anew; half keys go on."""
        self.reads = 0
        self.counts.zero_()
        if self.weights is not None:
            self.weights.zero_()

    def by_count(self) -> UsageStatistics:
        """Statistics in which every read counts one."""
        return UsageStatistics.of(self.counts)

    def by_weight(self) -> UsageStatistics:
        """Statistics in which every read counts its weight; needs `weighted`."""
        return UsageStatistics.of(self.weights)


def recording_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The product-key memories of `model`, by module name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "usage")}


@contextlib.contextmanager
def recording(recorders: list[tuple[nn.Module, SlotUsage]]) -> Iterator[None]:
    """While active, each memory reports its reads to the recorder beside it."""
    for module, recorder in recorders:
        module.usage = recorder
    try:
        yield
    finally:
        for module, _ in recorders:
            module.usage = None


@contextlib.contextmanager
def record_usage(model: nn.Module) -> Iterator[dict[str, SlotUsage]]:
    """Record the reads of every product-key memory of `model`, by module name.

    Padding is left out. Recomputed passes (gradient checkpointing) are counted again if the
    backward pass runs in here.
    """
    modules = recording_modules(model)
    recorders = {
        name: SlotUsage(module.config.slots, module.keys.device) for name, module in modules.items()
    }
    with recording(list(zip(modules.values(), recorders.values(), strict=True))):
        yield recorders
