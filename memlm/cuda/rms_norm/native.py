"""RMSNorm of a few rows in C++, as in decoding on a CPU: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.dispatch import may_be_chosen

SOURCE = Path(__file__).with_name("native.cpp")
LARGEST = 1 << 14  # numbers; of more, torch's own operations take no longer


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why `rms_norm` is not for these, or None."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}, it runs on the CPU"
    if x.numel() > LARGEST:
        return f"there are {x.numel()} numbers, it is for {LARGEST} at most"
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
        return "it has no gradients and is not traced"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return "it computes in float32"
    if x.shape[-1:] != weight.shape:
        return f"the weight has the shape {tuple(weight.shape)}, the rows {tuple(x.shape[-1:])}"
    if not may_be_chosen("rms_norm", "native"):
        return "another implementation is forced"
    return native.refusal("rms_norm", SOURCE)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, times activation(gate).

    Args:
        x: [..., channels], float32.
        weight: [channels].
        eps: added to the mean of the squares.
        gate: as many numbers as x; None = no gate.
        activation: "silu" or "sigmoid".
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    gate = None if gate is None else gate.float().contiguous()
    weight = weight.contiguous()
    pointers = (x.data_ptr(), weight.data_ptr(), None if gate is None else gate.data_ptr())
    channels = x.shape[-1]
    rows = x.numel() // channels if channels else 0
    _function()(*pointers, y.data_ptr(), rows, channels, activation == "silu", eps)
    return y


@functools.cache
def _function() -> ctypes._CFuncPtr:
    function = native.load(SOURCE).memlm_rms_norm
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (*[pointer] * 4, *[number] * 3, ctypes.c_double)
    function.restype = None
    return function
