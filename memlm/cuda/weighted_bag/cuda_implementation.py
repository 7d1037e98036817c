"""The forward gather in CUDA C++, see bag.cu; all else as in Triton."""

import ctypes
import functools

import torch
from torch import Tensor

from memlm.cuda import nvcc_library
from memlm.cuda.dispatch import multiprocessors
from memlm.cuda.weighted_bag.device import SOURCE
from memlm.cuda.weighted_bag.triton_bag import dot
from memlm.cuda.weighted_bag.triton_rows import dense_gradient, row_gradients, update_rows

__all__ = ["bag", "dense_gradient", "dot", "row_gradients", "update_rows"]


def bag(
    indices: Tensor, weights: Tensor, values: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag`; also the sums without the gate."""
    tokens, length = indices.shape
    out = torch.empty(tokens, values.shape[1], dtype=values.dtype, device=values.device)
    sums = out if gate is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, sums
    indices, weights, values = indices.int().contiguous(), weights.float(), values.contiguous()
    weights = weights.contiguous()
    gate = None if gate is None else gate.to(values.dtype).contiguous()
    tensors = (indices, weights, values, gate, out, None if gate is None else sums)
    with torch.cuda.device_of(values):
        failure = _library(values.device).memlm_bag(
            values.element_size(),
            values.dtype == torch.bfloat16,
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            tokens,
            length,
            values.shape[1],
            multiprocessors(values.device),
            values.device.index,
            torch.cuda.current_stream(values.device).cuda_stream,
        )
    if failure is not None:
        raise RuntimeError(f"weighted_bag: {failure.decode()} (bag.cu, {values.device})")
    return out, sums


@functools.cache
def _library(device: torch.device) -> ctypes.CDLL:
    library = nvcc_library.load(SOURCE, device)
    number, long, pointer = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
    sizes = (long, number, long, number, number)
    library.memlm_bag.argtypes = (number, number, *[pointer] * 6, *sizes, pointer)
    library.memlm_bag.restype = ctypes.c_char_p
    return library
