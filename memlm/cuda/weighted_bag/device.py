"""Which tables the kernels for GPUs take, known without loading them."""

from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import nvcc_library
from memlm.cuda.dispatch import VARIABLE, capability, may_be_chosen, triton_unavailable

MAX_WIDTH = 8192  # channels: a program that updates a row holds all of it
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SOURCE = Path(__file__).with_name("bag.cu")
# Types and widths of tables for which bag.cu was measured to be faster than the Triton kernel, on
# the cards of these compute capabilities: (80, torch.bfloat16, 1024). None has been measured yet,
# so that it runs only where it is forced.
FASTER_IN_CUDA: frozenset[tuple[int, torch.dtype, int]] = frozenset()


def triton_refusal(values: Tensor) -> str | None:
    """Why the Triton kernels are not for a table like this one, or None."""
    if values.dtype not in DTYPES:
        return f"the table is {str(values.dtype).removeprefix('torch.')}, they sum in float32"
    if values.shape[1] > MAX_WIDTH:
        return f"a row has {values.shape[1]} channels, the kernels take up to {MAX_WIDTH}"
    if len(values) >= 2**31:
        return f"the table has {len(values)} rows, the kernels number them with 31 bits"
    return None


def cuda_refusal(values: Tensor) -> str | None:
    """Why bag.cu is not for a table like this one, or not to be chosen for it, or None."""
    device = values.device
    if device.type != "cuda":
        return f"the table is on {device.type}, it runs on a CUDA GPU"
    # The gradients are Triton's.
    reason = triton_unavailable(device) or triton_refusal(values)
    if reason is not None:
        return reason
    kind = (capability(device), values.dtype, values.shape[1])
    if may_be_chosen("weighted_bag", "triton") and kind not in FASTER_IN_CUDA:
        return (
            "it was not measured to be faster than the Triton kernel for such a table; force it "
            f"with {VARIABLE}=auto,weighted_bag=cuda"
        )
    return nvcc_library.refusal("weighted_bag", SOURCE, device)
