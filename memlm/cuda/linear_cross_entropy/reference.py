"""The formula, with all logits at once."""

import torch
from torch import Tensor

from memlm.cuda.linear_cross_entropy.inputs import Inputs


def linear_cross_entropy_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss, with autograd's gradients, and the losses [N]: see `linear_cross_entropy`."""
    logits = inputs.hidden.to(inputs.dtype) @ inputs.weight.to(inputs.dtype).T
    logits = logits.to(inputs.sum_dtype)
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    counts = inputs.targets != inputs.ignore_index
    log_sum = logits.logsumexp(-1)
    chosen = logits.gather(-1, inputs.targets.where(counts, 0)[:, None]).squeeze(-1)
    losses = log_sum - chosen
    total = losses + inputs.z_loss * log_sum.square()
    if inputs.token_weights is not None:
        total = total * inputs.token_weights
    return torch.where(counts, total, 0).sum(), torch.where(counts, losses, 0).detach()
