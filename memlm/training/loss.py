"""Losses of packed rows, summed per group of targets."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.config import LOSS_GROUPS
from memlm.layers.state import MemoryState

IGNORED = -100
MODEL_INPUTS = ("input_ids", "segment_ids", "position_ids")
Batch = dict[str, Tensor]
States = dict[str, MemoryState]
StateGradients = dict[tuple[str, str], Tensor]  # by name of the state and field


def group_counts(batch: Batch, sources: int = 1) -> Tensor:
    """Targets of each loss group, int64 [groups]; of several sources [sources * groups], the groups
    of the first source first.

    Args:
        batch: labels and loss_groups; of several sources, the source of each target as well.
        sources: their number.
    """
    targets = _cells(batch, sources)[batch["labels"] != IGNORED]
    return torch.bincount(targets, minlength=sources * len(LOSS_GROUPS))


def _cells(batch: Batch, sources: int) -> Tensor:
    """Which of the sums of a loss each target belongs to, int64 [B, T]."""
    groups = batch["loss_groups"]
    return groups if sources == 1 else groups + len(LOSS_GROUPS) * batch["sources"]


def group_coefficients(counts: Tensor, weights: dict[str, float] | None) -> Tensor:
    """Factors that turn the groups' summed losses into the loss of a step, float32 as `counts`.

    Args:
        counts: int64 [groups] or [sources * groups] (see `group_counts`), targets of each group in
            the whole step, over all processes and micro-batches.
        weights: weight of each group's mean; a group that is not named has weight 0 and one
            without targets is left out. None = the mean over all targets.
    """
    if weights is None:
        return torch.ones(len(counts)) / counts.sum().clamp(min=1)
    weight = torch.tensor([weights.get(name, 0.0) for name in LOSS_GROUPS])
    groups = counts.view(-1, len(LOSS_GROUPS))
    return (weight / groups.sum(0).clamp(min=1)).expand(groups.shape).flatten()


def total(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum of `values` over all processes."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum").to(values.device)


class RowLoss(nn.Module):
    """A language model that returns the summed losses of a batch.

    Data parallelism wraps this module, so it sees exactly the graph of the loss: returned states
    are detached and logits never leave.

    Args:
        model: the language model.
        sources: sources of the data, whose losses are told apart.
    """

    def __init__(self, model: nn.Module, sources: int = 1):
        super().__init__()
        self.model, self.sources = model, sources

    def forward(
        self,
        batch: Batch,
        memory_states: States | None = None,
        carry: bool = False,
        use_memory: bool = True,
        state_gradients: StateGradients | None = None,
    ) -> tuple[Tensor, States | None]:
        """Sum the negative log-likelihoods, in nats, of each loss group.

        Args:
            batch: int64 [B, T] input_ids, segment_ids, position_ids, labels (shifted already,
                -100 = no target) and loss_groups; where sources are told apart, sources too.
            memory_states: states the rows continue from; None = none.
            carry: whether to return the new states, detached.
            use_memory: False switches every memory off.
            state_gradients: with `carry`, the gradients of the new states in a loss of later
                tokens. One more entry follows the groups: its gradient is what flows back through
                those states, its value means nothing.

        Returns:
            float32 (float64 of a float64 model) [groups], or [sources * groups] where the batch
            has sources, and the states or None.
        """
        output = self.model(
            **{name: batch[name] for name in MODEL_INPUTS},
            memory_states=memory_states,
            return_memory_states=carry,
            use_memory=use_memory,
            use_cache=False,
        )
        sources = self.sources if "sources" in batch else 1
        labels, cells = batch["labels"].flatten(), _cells(batch, sources).flatten()
        logits = output.logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        # Without indexing by a mask, which would wait for the device.
        count = sources * len(LOSS_GROUPS)
        sums = torch.stack([torch.where(cells == cell, losses, 0).sum() for cell in range(count)])
        if not carry:
            return sums, None
        if state_gradients is not None:
            flows = [
                output.memory_states[name].tensors()[field].flatten().dot(gradient.flatten())
                for (name, field), gradient in state_gradients.items()
            ]
            flow = sum((flow.to(sums.dtype) for flow in flows), sums.new_zeros(()))
            sums = torch.cat([sums, flow[None]])
        return sums, {name: state.detach() for name, state in output.memory_states.items()}
