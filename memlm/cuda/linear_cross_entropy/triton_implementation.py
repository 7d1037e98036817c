"""The loss in Triton, as the operator calls it."""

import torch
from torch import Tensor

from memlm.cuda.linear_cross_entropy import triton_launchers
from memlm.cuda.linear_cross_entropy.inputs import Inputs


def forward(
    inputs: Inputs, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the losses [N], and the log-sum-exps [N] where a gradient is needed."""
    hidden, weight = _operands(inputs)
    losses, log_sum = triton_launchers.forward(
        hidden, weight, inputs.targets.contiguous(), inputs.ignore_index, inputs.softcap
    )
    total = losses + inputs.z_loss * log_sum.square()
    if inputs.token_weights is not None:
        # A token that does not count adds nothing, whatever its weight.
        counts = inputs.targets != inputs.ignore_index
        total = torch.where(counts, total * inputs.token_weights, 0)
    return total.sum(), losses, [log_sum] if needs_hidden or needs_weight else []


def saved_like(inputs: Inputs, needs_hidden: bool, needs_weight: bool) -> list[Tensor]:
    """Empty tensors like what `forward` saves."""
    if not (needs_hidden or needs_weight):
        return []
    return [inputs.hidden.new_empty(inputs.sizes[0], dtype=inputs.sum_dtype)]


def backward(
    inputs: Inputs, saved: list[Tensor], grad: Tensor, needs_hidden: bool, needs_weight: bool
) -> list[Tensor]:
    """The gradients that are needed."""
    hidden, weight = _operands(inputs)
    (log_sum,) = saved
    factors = grad if inputs.token_weights is None else grad * inputs.token_weights
    factors = torch.where(inputs.targets != inputs.ignore_index, factors, 0)
    gradients = inputs.gradients_like(needs_hidden, needs_weight)
    triton_launchers.backward(
        hidden,
        weight,
        inputs.targets.contiguous(),
        log_sum,
        factors,
        inputs.softcap,
        inputs.z_loss,
        gradients[0] if needs_hidden else None,
        gradients[-1] if needs_weight else None,
    )
    return gradients


def _operands(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden and weight in the type that is multiplied; under autocast, copies."""
    hidden, weight = inputs.hidden.to(inputs.dtype), inputs.weight.to(inputs.dtype)
    return hidden.contiguous(), weight.contiguous()
