"""Which searches the kernels for GPUs take, known without loading them."""

import torch
from torch import Tensor

QUERY_TYPES = (torch.float16, torch.bfloat16, torch.float32)
KEY_TYPES = (*QUERY_TYPES, torch.int8)
MOST = 512  # results per query; with more, most lanes would have to be looked through again


def triton_refusal(queries: Tensor, keys: Tensor, k: int) -> str | None:
    """Why the Triton kernels are not for these inputs, or None."""
    for name, tensor, types in (("queries", queries, QUERY_TYPES), ("keys", keys, KEY_TYPES)):
        if tensor.dtype not in types:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"the {name} are {dtype}, the kernels sum in float32"
    if keys.shape[2] == 0:
        return "the vectors have no channels"
    if k > MOST:
        return f"k is {k}, the kernels find up to {MOST}"
    if keys.shape[1] >= 2**31 - 2**16:
        return f"the kernels number keys with 31 bits, a store has {keys.shape[1]}"
    return None
