"""Which tables the kernels for GPUs take, known without loading them."""

import torch
from torch import Tensor

MAX_WIDTH = 8192  # channels: a program that updates a row holds all of it
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_refusal(values: Tensor) -> str | None:
    """Why the Triton kernels are not for a table like this one, or None."""
    if values.dtype not in DTYPES:
        return f"the table is {str(values.dtype).removeprefix('torch.')}, they sum in float32"
    if values.shape[1] > MAX_WIDTH:
        return f"a row has {values.shape[1]} channels, the kernels take up to {MAX_WIDTH}"
    if len(values) >= 2**31:
        return f"the table has {len(values)} rows, the kernels number them with 31 bits"
    return None
