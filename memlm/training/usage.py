"""How evenly training reads the tables of product-key memories: recorded, logged, drawn."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from memlm.memory.usage import (
    SlotUsage,
    UsageStatistics,
    record_usage,
    recording,
    recording_modules,
)
from memlm.training.loss import total

USAGE_PLOT_FILE = "usage.png"
# Reads per slot, on average, of a window. Random reads would then have used all slots but 0.005 %
# and have a KL to uniform of 0.05 nats; with one read per slot they would seem to use 63 % only.
WINDOW = 10
CURVE_POINTS = 200


class UsageLog:
    """Reads of every product-key memory of `model` in training, over windows of steps.

    A window begins where the one before was reported, at the start or where the run was resumed,
    and is reported at the first log step at which slots were read `WINDOW` times on average: the
    reads of few tokens cannot tell an unused slot from one whose turn has not come. Every token
    counts once: not padding, and not what the backward pass recomputes.

    Args:
        model: the model.
        accelerator: its processes, whose reads are summed; `report` is collective.
        half_keys: also count the reads of half keys.

    Attributes:
        recorders: the counts of this process by site.
        curves: of the latest window by site: ranks of slots, the most read first, and their reads
            as multiples of the mean.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, half_keys: bool = False):
        self.accelerator = accelerator
        self.modules = {site_name(name): m for name, m in recording_modules(model).items()}
        self.recorders = {
            site: SlotUsage(
                module.config.slots,
                accelerator.device,
                weighted=False,
                half_keys=(module.config.num_heads, module.config.num_keys) if half_keys else None,
            )
            for site, module in self.modules.items()
        }
        self.curves: dict[str, tuple[list[int], list[float]]] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Record what the memories read in here: forward passes, not the backward passes."""
        with recording(list(zip(self.modules.values(), self.recorders.values(), strict=True))):
            yield

    def remember(self) -> Callable[[], None]:
        """Note the counts, for a step that may turn out to be skipped; returns how to put them
        back."""
        kept = []
        for recorder in self.recorders.values():
            counts = [one for one in (recorder.counts, recorder.half_keys) if one is not None]
            kept.append((recorder, recorder.reads, [(one, one.clone()) for one in counts]))

        def undo() -> None:
            for recorder, reads, counts in kept:
                recorder.reads = reads
                for one, before in counts:
                    one.copy_(before)

        return undo

    def report(self, last: bool = False) -> dict[str, float]:
        """Statistics by site of the windows that are over; those sites begin a new one.

        Args:
            last: whether the run ends here: sites that never had a whole window report what
                there is.

        Returns:
            SITE.used, SITE.kl_to_uniform, SITE.top1_mass (see `UsageStatistics`; every read counts
            one) and SITE.reads_per_slot, the length of the window.
        """
        if not self.recorders:
            return {}
        reads = torch.tensor([recorder.reads for recorder in self.recorders.values()])
        result = {}
        for (site, recorder), read in zip(
            self.recorders.items(), total(reads, self.accelerator).tolist(), strict=True
        ):
            per_slot = read / recorder.counts.numel()
            if per_slot < WINDOW and not (last and read and site not in self.curves):
                continue
            counts = total(recorder.counts.long(), self.accelerator)
            recorder.clear()
            statistics = UsageStatistics.of(counts)
            for name in ("used", "kl_to_uniform", "top1_mass"):
                result[f"{site}.{name}"] = getattr(statistics, name)
            result[f"{site}.reads_per_slot"] = per_slot
            self.curves[site] = rank_curve(counts)
        return result


def rank_curve(counts: Tensor) -> tuple[list[int], list[float]]:
    """Ranks of slots, evenly spaced on a logarithmic axis, and their reads / the mean reads."""
    slots = counts.numel()
    ranks = torch.logspace(0, math.log10(slots), CURVE_POINTS)
    ranks = ranks.round().long().clamp(1, slots).unique()
    ordered = counts.sort(descending=True).values.cpu()
    reads = ordered[ranks - 1].double() * slots / ordered.sum()
    return ranks.tolist(), reads.tolist()


@contextlib.contextmanager
def held_out_usage(model: nn.Module, accelerator: Accelerator) -> Iterator[dict[str, float]]:
    """Record the reads in here; afterwards the dictionary holds their statistics by site.

    Every read counts its weight. Collective at the end.
    """
    result: dict[str, float] = {}
    with record_usage(model) as recorders:
        yield result
    for name, recorder in recorders.items():
        statistics = UsageStatistics.of(total(recorder.weights, accelerator))
        for key, value in dataclasses.asdict(statistics).items():
            result[f"{site_name(name)}.{key}"] = value


def site_name(module_name: str) -> str:
    """`layers.3.ffn` of the module `model.layers.3.ffn.module`."""
    return module_name.removeprefix("model.").removesuffix(".module")
