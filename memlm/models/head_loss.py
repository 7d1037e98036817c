"""The loss of a language model's head: without logits in training, or of given ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from memlm.cuda.linear_cross_entropy import linear_cross_entropy
from memlm.errors import UserError

IGNORED = -100


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """``c tanh(logits / c)``, of the same shape and dtype; None = as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def needs_logits(model: PreTrainedModel, logits_to_keep: int | Tensor = 0) -> str | None:
    """Why the loss of a `MemLMForCausalLM` cannot do without its logits; None = it can.

    Args:
        model: its head may have an adapter, a hook or shards of its own, of which its weight alone
            tells nothing.
        logits_to_keep: as the model was told.
    """
    head = model.lm_head
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    if model.output_memory is not None:
        return "the output memory changes logits"
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        return "logits_to_keep asks for logits"
    if not plain or head._forward_hooks or head._forward_pre_hooks:
        return "the head is more than its weight (an adapter, a hook, or shards of its own)"
    return None


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The loss that a call of a `MemLMForCausalLM` asks for.

    Attributes:
        model: the model.
        labels, shift_labels, token_weights, z_loss: arguments of the call.
        options: its further ones, of which `num_items_in_batch` and `ignore_index` count.
    """

    model: PreTrainedModel
    labels: Tensor | None
    shift_labels: Tensor | None
    token_weights: Tensor | None
    z_loss: float
    options: Mapping[str, Any]

    @property
    def wanted(self) -> bool:
        """Whether the call has targets."""
        return self.labels is not None or self.shift_labels is not None

    def skips_logits(self, asked: bool | None, logits_to_keep: int | Tensor) -> bool:
        """Whether it is made without logits.

        Args:
            asked: `skip_logits` of the call; None = in training wherever it is possible, unless the
                model was given a `loss_function`.
            logits_to_keep: of the call.

        Raises:
            UserError: where it is asked for and not possible.
        """
        reason = "there are no labels"
        if self.wanted:
            reason = needs_logits(self.model, logits_to_keep)
        if asked and reason is not None:
            raise UserError(f"skip_logits: {reason}; leave it unset")
        if asked is None:
            own = hasattr(self.model, "_loss_function")
            return self.model.training and reason is None and not own
        return asked

    def of_hidden(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss without logits, and the tokens' losses.

        Args:
            hidden: [B, T, hidden_size], the input of the head.

        Returns:
            A float32 scalar (float64 of float64), and nats [B, T] as in `linear_cross_entropy`.
        """
        ignored, targets = self._targets()
        loss, losses = linear_cross_entropy(
            hidden,
            self.model.lm_head.weight,
            targets,
            self.token_weights,
            ignore_index=ignored,
            softcap=self.model.config.final_logit_softcapping,
            z_loss=self.z_loss,
        )
        return self._reduced(loss, targets, ignored), losses

    def of_logits(self, logits: Tensor) -> Tensor:
        """The loss of logits [B, T, V]: transformers' own, unless tokens are weighted."""
        if self.token_weights is None and not self.z_loss:
            return self.model.loss_function(
                logits,
                self.labels,
                self.model.config.vocab_size,
                shift_labels=self.shift_labels,
                **self.options,
            )
        ignored, targets = self._targets()
        loss, _ = logits_loss(logits, targets, self.token_weights, self.z_loss, ignored)
        return self._reduced(loss, targets, ignored)

    def _targets(self) -> tuple[int, Tensor]:
        ignored = self.options.get("ignore_index", IGNORED)
        if self.shift_labels is not None:
            return ignored, self.shift_labels
        return ignored, F.pad(self.labels[..., 1:], (0, 1), value=ignored)

    def _reduced(self, loss: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """As in transformers, the sum over a number or the mean; with weights the sum is meant."""
        items = self.options.get("num_items_in_batch")
        if items is None and self.token_weights is None:
            items = (targets != ignored).sum()
        if isinstance(items, Tensor):
            items = items.to(loss.device)
        return loss if items is None else loss / items


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    z_loss: float,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """What `linear_cross_entropy` computes, of logits [..., V] that are there."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    losses = flat.view(targets.shape)
    total = losses
    if z_loss:
        squares = logits.logsumexp(-1).square()
        total = losses + torch.where(targets != ignore_index, z_loss * squares, 0)
    if token_weights is not None:
        total = total * token_weights
    return total.sum(), losses.detach()
