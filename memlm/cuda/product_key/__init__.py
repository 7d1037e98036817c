"""Product keys: exact top-k among n * n slots from two lists of n half keys.

Lample et al. 2019, "Large Memory Layers with Product Keys".
"""

import importlib

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.product_key import device, native, operator
from memlm.errors import UserError

MODULES = {
    "reference": "memlm.cuda.product_key.reference",
    "eager": "memlm.cuda.product_key.eager",
    "native": "memlm.cuda.product_key.native",
    "triton": "memlm.cuda.product_key.triton_select",
}


@torch.compiler.disable
def product_key_select(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best of n * n product keys for every token and head.

    Slot i1 * n + i2 scores query[t, h, 0] . sub_keys[h, 0, i1] + query[t, h, 1] . sub_keys[h, 1,
    i2], computed in at least float32. The choice is exact. Equal scores are ordered by the rank of
    i1 in its half, then by the rank of i2; equal half scores rank by lowest index.

    Args:
        query: [T, H, 2, D / 2].
        sub_keys: [H, 2, n, D / 2].
        k: slots per token and head, at most n.

    Returns:
        indices: int32 [T, H, k], best first.
        weights: [T, H, k], softmax of the chosen scores over k, float32 (float64 for float64
            inputs), differentiable with respect to query and sub_keys.

    Raises:
        UserError: the shapes do not fit, k is not in 1..n, or n * n does not fit into int32.
    """
    fit = query.ndim == sub_keys.ndim == 4 and query.shape[2] == 2
    if not fit or query.shape[1:] != (*sub_keys.shape[:2], sub_keys.shape[3]):
        raise UserError(
            f"product_key_select: query {list(query.shape)} and sub_keys {list(sub_keys.shape)} do "
            "not fit; they must be [T, H, 2, D / 2] and [H, 2, n, D / 2]"
        )
    n = sub_keys.shape[2]
    if not 1 <= k <= n:
        raise UserError(f"product_key_select: k = {k} must lie in 1..{n}, the number of half keys")
    if n * n > 2**31:
        raise UserError(f"product_key_select: {n} half keys make more slots than int32 can name")
    refusals = {
        "reference": None,
        "eager": None,
        "native": native.refusal(query),
        "triton": device.triton_refusal(query, sub_keys, k),
    }
    name = choose_name("product_key_select", refusals, query.device)
    module = importlib.import_module(MODULES[name])
    return operator.ProductKeySelect.apply(query, sub_keys, k, module)
