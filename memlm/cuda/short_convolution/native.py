"""One token per row of the short convolution in C++, as in decoding: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.short_convolution.inputs import Inputs

SOURCE = Path(__file__).with_name("native.cpp")


def refusal(inputs: Inputs) -> str | None:
    """Why these inputs are not for this implementation, or None."""
    x = inputs.x
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}, it runs on the CPU"
    if x.shape[1] != 1 or inputs.cu_seqlens is not None:
        return "it takes one token per row"
    if x.dtype != torch.float32 or inputs.weight.dtype != torch.float32:
        return f"x is {x.dtype} and the weight {inputs.weight.dtype}, it computes in float32"
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
        return "it has no gradients and is not traced"
    return native.refusal("short_convolution", SOURCE)


class _Part(ctypes.Structure):
    """`Part` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "channels", "normalize")),
        ("out", ctypes.c_void_p),
    )


def forward(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """See `short_convolution`; the outputs come in parts."""
    x, weight, tail = inputs.x, inputs.weight, inputs.tail
    B, _, D = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    weight, tail = weight.contiguous(), tail.contiguous()
    new_tail = torch.empty_like(tail)
    outputs = [x.new_empty(shape) for shape in inputs.part_shapes()]
    parts = (_Part * len(outputs))(
        *((*part, output.data_ptr()) for part, output in zip(inputs.parts, outputs, strict=True))
    )
    sizes = (B, D, weight.shape[2], inputs.silu, len(outputs))
    pointers = (weight.data_ptr(), tail.data_ptr(), new_tail.data_ptr())
    _step()(x.data_ptr(), x.stride(0), *pointers, *sizes, parts)
    return outputs, new_tail


@functools.cache
def _step() -> ctypes._CFuncPtr:
    function = native.load(SOURCE).memlm_step
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (
        *(pointer, number, pointer, pointer, pointer),
        *(number, number, number, number, number, ctypes.POINTER(_Part)),
    )
    function.restype = None
    return function
