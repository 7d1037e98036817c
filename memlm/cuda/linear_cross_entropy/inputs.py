"""The arguments of one call, checked, as every implementation gets them."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Inputs:
    """See `linear_cross_entropy` for the meaning; tokens have one dimension, targets are shifted.

    Attributes:
        hidden: [N, D], of any strides.
        weight: [V, D], of any strides.
        targets: int64 [N].
        token_weights: [N] of `sum_dtype`, or None.
        ignore_index, softcap, z_loss: as in the call.
        dtype: of the operands of products, which is that of hidden and weight or, under autocast,
            the one that both are to be rounded to.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor | None
    ignore_index: int
    softcap: float | None
    z_loss: float
    dtype: torch.dtype

    @classmethod
    def of_call(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor | None,
        ignore_index: int,
        softcap: float | None,
        z_loss: float,
        shift: bool,
    ) -> "Inputs":
        """Check and flatten the arguments of `linear_cross_entropy`; nothing [N, D] is copied.

        Raises:
            ValueError: shapes, types or options that do not fit.
        """
        _check(hidden, weight, targets, token_weights, softcap, z_loss, shift)
        dtype = _product_dtype(hidden, weight)
        if shift and targets.shape[-1]:
            targets = F.pad(targets[..., 1:], (0, 1), value=ignore_index)
        tokens = targets.numel()
        if token_weights is not None:
            sums = torch.promote_types(dtype, torch.float32)
            token_weights = token_weights.detach().reshape(tokens).to(sums)
        hidden = hidden.reshape(tokens, weight.shape[1])
        targets = targets.reshape(tokens)
        return cls(hidden, weight, targets, token_weights, ignore_index, softcap, z_loss, dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, V, D."""
        return self.hidden.shape[0], *self.weight.shape

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of the logits, the sums and the losses: float64 of float64 operands, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def gradients_like(self, needs_hidden: bool, needs_weight: bool) -> list[Tensor]:
        """Empty tensors for the gradients that are needed, that of hidden first."""
        tensors = [self.hidden] if needs_hidden else []
        tensors += [self.weight] if needs_weight else []
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]

    def check_targets(self) -> None:
        """Raise ValueError for a target that is no row of the weight.

        Only on the CPU: a GPU would have to be waited for. What such a target does there depends
        on the implementation.
        """
        if self.targets.device.type != "cpu":
            return
        V = self.weight.shape[0]
        counts = self.targets != self.ignore_index
        wrong = self.targets[counts & ((self.targets < 0) | (self.targets >= V))]
        if len(wrong):
            raise ValueError(
                f"a target is {int(wrong[0])}: expected one of [0, {V}) or the ignore_index "
                f"{self.ignore_index}"
            )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    shift: bool,
) -> None:
    if weight.ndim != 2 or weight.shape[0] == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: expected floating point [V, D]"
        )
    if targets.dtype != torch.int64 or (shift and targets.ndim == 0):
        raise ValueError(
            f"targets are {targets.dtype} {tuple(targets.shape)}: expected int64, and a last "
            "dimension to shift along"
        )
    expected = (*targets.shape, weight.shape[1])
    if hidden.shape != expected or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}: expected floating point "
            f"{tuple(expected)}, the shape of targets and the weight's D"
        )
    if token_weights is not None and (
        token_weights.shape != targets.shape or not token_weights.is_floating_point()
    ):
        raise ValueError(
            f"token_weights are {token_weights.dtype} {tuple(token_weights.shape)}: expected "
            f"floating point {tuple(targets.shape)}, as targets"
        )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}: expected a positive number or None")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss is {z_loss}: expected 0 or a positive number")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    # As torch's own products: autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}")
    return hidden.dtype
