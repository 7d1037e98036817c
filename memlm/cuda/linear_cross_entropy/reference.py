"""The formula, with all logits at once."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.linear_cross_entropy`."""
    if shift:
        targets = F.pad(targets[..., 1:], (0, 1), value=ignore_index)
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = targets != ignore_index
    log_sum = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.where(counts, 0)[..., None]).squeeze(-1)
    losses = torch.where(counts, log_sum - chosen, 0)
    penalties = torch.where(counts, z_loss * log_sum.square(), 0)
    total = losses + penalties
    if token_weights is not None:
        total = total * token_weights.to(total.dtype)
    return total.sum(), losses.detach()
