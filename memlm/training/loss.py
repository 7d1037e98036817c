"""Losses of packed rows, summed per group of targets."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from memlm.config import LOSS_GROUPS
from memlm.layers.state import MemoryState
from memlm.models.head_loss import IGNORED, logits_loss, needs_logits
from memlm.models.modeling import MemLMForCausalLM, MemLMOutput

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
    """A language model that returns the loss of a batch.

    Data parallelism wraps this module, so it sees exactly the graph of the loss: returned states
    are detached and logits never leave. A `MemLMForCausalLM` makes none unless it has to.

    Args:
        model: the language model.
        sources: sources of the data, whose losses are told apart.
        z_loss: weight of the square of the logarithm of the softmax's denominator.
    """

    def __init__(self, model: nn.Module, sources: int = 1, z_loss: float = 0.0):
        super().__init__()
        self.model, self.sources, self.z_loss = model, sources, z_loss

    def forward(
        self,
        batch: Batch,
        memory_states: States | None = None,
        scale: Tensor | None = None,
        carry: bool = False,
        use_memory: bool = True,
        state_gradients: StateGradients | None = None,
    ) -> tuple[Tensor, Tensor, States | None]:
        """The loss, and the negative log-likelihoods, in nats, summed for each loss group.

        Args:
            batch: int64 [B, T] input_ids, segment_ids, position_ids, labels (shifted already,
                -100 = no target) and loss_groups; where sources are told apart, sources too.
            memory_states: states the rows continue from; None = none.
            scale: float32 [groups], or [sources * groups] where the batch has sources: the weight
                of a target in the loss, by its group; None = 1.
            carry: whether to return the new states, detached.
            use_memory: False switches every memory off.
            state_gradients: with `carry`, the gradients of the new states in a loss of later
                tokens. What flows back through those states is added to the gradient of the loss,
                whose value means nothing then.

        Returns:
            The loss to back-propagate, with the z-loss in it; the sums, detached, float32 (float64
            of a float64 model) and shaped as `scale`; and the states or None.
        """
        sources = self.sources if "sources" in batch else 1
        labels, cells = batch["labels"], _cells(batch, sources)
        weights = torch.ones_like(cells, dtype=torch.float32) if scale is None else scale[cells]
        arguments = {
            **{name: batch[name] for name in MODEL_INPUTS},
            "memory_states": memory_states,
            "return_memory_states": carry,
            "use_memory": use_memory,
            "use_cache": False,
        }
        if isinstance(self.model, MemLMForCausalLM) and needs_logits(self.model) is None:
            targets = {"shift_labels": labels, "token_weights": weights, "z_loss": self.z_loss}
            output = self.model(**arguments, **targets, skip_logits=True)
            loss, losses = output.loss, output.token_losses
        else:
            output = self.model(**arguments)
            loss, losses = logits_loss(output.logits, labels, weights, self.z_loss)
        # Without indexing by a mask, which would wait for the device.
        count = sources * len(LOSS_GROUPS)
        sums = torch.stack([torch.where(cells == cell, losses, 0).sum() for cell in range(count)])
        if not carry:
            return loss, sums, None
        for (name, field), gradient in (state_gradients or {}).items():
            state = output.memory_states[name].tensors()[field]
            loss = loss + state.flatten().dot(gradient.flatten()).to(loss.dtype)
        return loss, sums, {n: state.detach() for n, state in output.memory_states.items()}

    def call_model(self, **arguments: Any) -> MemLMOutput:
        """The model's own output.

        Weights outside of the blocks that FSDP2 shards are there only while this module is called.
        """
        return self.model(**arguments)
