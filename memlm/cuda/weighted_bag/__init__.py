"""Weighted sums of a table's rows, and updates of the rows that were read.

Lample et al. 2019, "Large Memory Layers with Product Keys", equation 5; Berges et al. 2024,
"Memory Layers at Scale", section 3.1.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.weighted_bag import device, native, operator
from memlm.cuda.weighted_bag.reads import PendingReads, Reads
from memlm.cuda.weighted_bag.rules import LazyAdam, RowwiseAdagrad, Rule
from memlm.errors import UserError

__all__ = [
    "LazyAdam",
    "PendingReads",
    "Reads",
    "RowwiseAdagrad",
    "Rule",
    "gathered_dot",
    "row_gradients",
    "update_rows",
    "weighted_bag",
]

MODULES = {
    "reference": "memlm.cuda.weighted_bag.reference",
    "eager": "memlm.cuda.weighted_bag.eager",
    "native": "memlm.cuda.weighted_bag.native",
    "triton": "memlm.cuda.weighted_bag.triton_implementation",
    "cuda": "memlm.cuda.weighted_bag.cuda_implementation",
}


@torch.compiler.disable
def weighted_bag(
    indices: Tensor,
    weights: Tensor,
    values: Tensor,
    gate: Tensor | None = None,
    pending: PendingReads | None = None,
) -> Tensor:
    """Sum rows of a table: out[t] = (sum over b of weights[t, b] values[indices[t, b]]) silu(gate).

    Sums are in float32 (float64 for tables in float64), the gradients deterministic: those of a
    row are added in the order of its reads.

    Args:
        indices: integer [T, bag], rows of `values`; a bag may be empty.
        weights: [T, bag].
        values: [N, V].
        gate: [T, V]; without it nothing is multiplied.
        pending: takes the gradient of `values` as reads; without it autograd gets a gradient of
            the whole table.

    Returns:
        [T, V] in the dtype of `values`; differentiable with respect to weights, values and gate.

    Raises:
        UserError: for shapes that do not fit.
    """
    _check_bags(indices, weights, "weights")
    if gate is not None and gate.shape != (len(indices), values.shape[1]):
        raise UserError(
            f"weighted_bag: gate is {list(gate.shape)}, it must be "
            f"{[len(indices), values.shape[1]]}: one number per token and channel"
        )
    module = implementation(values)
    return operator.WeightedBag.apply(indices, weights, values, gate, pending, module)


@torch.compiler.disable
def gathered_dot(
    indices: Tensor, x: Tensor, values: Tensor, pending: PendingReads | None = None
) -> Tensor:
    """Multiply tokens with rows of a table: out[t, b] = values[indices[t, b]] . x[t].

    The adjoint of `weighted_bag`, and the first half of an expert of PEER (He 2024,
    arXiv 2407.04153).

    Args:
        indices: integer [T, bag].
        x: [T, V].
        values: [N, V].
        pending: as for `weighted_bag`.

    Returns:
        [T, bag] in float32 (float64 for float64), differentiable with respect to x and values.

    Raises:
        UserError: for shapes that do not fit.
    """
    if indices.ndim != 2 or x.shape != (len(indices), values.shape[1]):
        raise UserError(
            f"gathered_dot: indices {list(indices.shape)}, x {list(x.shape)} and values "
            f"{list(values.shape)} do not fit; they must be [T, bag], [T, V] and [N, V]"
        )
    return operator.GatheredDot.apply(indices, x, values, pending, implementation(values))


def row_gradients(reads: Sequence[Reads], num_rows: int) -> tuple[Tensor, Tensor]:
    """Sum the gradients of the rows that were read, in the order of the reads.

    Args:
        reads: at least one; all with V channels, for a table of `num_rows` rows.

    Returns:
        rows: int64 [U], ascending.
        gradient: [U, V] in float32 (float64 for float64).
    """
    return implementation(reads[0].grad).row_gradients(reads, num_rows)


@torch.no_grad()
def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """Update the rows that were read by their summed gradients; the others are not touched.

    Args:
        reads: the gradient; nothing happens without any.
        values: [N, V], contiguous; changed in place.
        state: what `rule.init_state` made; changed in place.
        rule: `LazyAdam` or `RowwiseAdagrad`.

    Raises:
        UserError: for tensors that do not fit, or are not contiguous.
    """
    if reads:
        _check_update(reads, values, state)
        implementation(values).update_rows(reads, values, state, rule)


def implementation(values: Tensor) -> ModuleType:
    """The module that serves a table like this one."""
    name = choose_name(
        "weighted_bag", {name: refusal(name, values) for name in MODULES}, values.device
    )
    return importlib.import_module(MODULES[name])


def refusal(name: str, values: Tensor) -> str | None:
    """Why an implementation cannot take this table, or None."""
    refusals = {
        "native": native.refusal,
        "triton": device.triton_refusal,
        "cuda": device.cuda_refusal,
    }
    return refusals[name](values) if name in refusals else None


def _check_bags(indices: Tensor, weights: Tensor, name: str) -> None:
    if indices.ndim != 2 or indices.shape != weights.shape:
        raise UserError(
            f"weighted_bag: indices {list(indices.shape)} and {name} {list(weights.shape)} must "
            "both be [T, bag]"
        )


def _check_update(reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor]) -> None:
    """Kernels write where these tensors should be, in the types they should have."""
    for part in reads:
        if part.grad.shape[1] != values.shape[1]:
            raise UserError(
                f"update_rows: the reads have {part.grad.shape[1]} channels, the table "
                f"{values.shape[1]}"
            )
    dtype = torch.promote_types(values.dtype, torch.float32)
    for name, tensor in {"values": values, **state}.items():
        if not tensor.is_contiguous():
            raise UserError(f"update_rows: {name} {list(tensor.shape)} must be contiguous")
        if name != "values" and (
            tensor.shape != values.shape[: tensor.ndim] or tensor.dtype != dtype
        ):
            raise UserError(
                f"update_rows: {name} is {list(tensor.shape)} in {tensor.dtype}, for a table "
                f"{list(values.shape)} in {values.dtype} it must be as init_state makes it, in "
                f"{dtype}"
            )
