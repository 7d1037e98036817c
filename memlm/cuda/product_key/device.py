"""Which selections the kernels for GPUs take, known without loading them."""

import torch
from torch import Tensor

MOST = 64  # slots per token and head: what is kept of a half stays in registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_refusal(query: Tensor, sub_keys: Tensor, k: int) -> str | None:
    """Why the Triton kernels are not for these inputs, or None."""
    for name, tensor in (("queries", query), ("sub_keys", sub_keys)):
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"the {name} are {dtype}, the kernels sum in float32"
    if k > MOST:
        return f"k is {k}, the kernels choose up to {MOST}"
    return None
