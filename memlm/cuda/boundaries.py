"""Boundaries of sequences packed along one row, as every operation takes them."""

import torch
from torch import Tensor


def check_boundaries(cu_seqlens: Tensor, rows: int, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` packs sequences into one row of so many tokens.

    Values are read only where they lie on the CPU: reading them from an accelerator would make the
    host wait for it.
    """
    if rows != 1:
        raise ValueError(f"cu_seqlens needs all tokens in one row, there are {rows} rows")
    shape, dtype = tuple(cu_seqlens.shape), cu_seqlens.dtype
    if len(shape) != 1 or shape[0] < 1 or dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {dtype} {shape}: expected int32 or int64 [N + 1]")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    rises = bounds == sorted(bounds)
    if bounds[0] != 0 or bounds[-1] != tokens or not rises:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}: it begins with "
            f"{bounds[0]}, ends with {bounds[-1]}, and {'rises' if rises else 'falls'} between"
        )


def boundaries_beside(cu_seqlens: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The boundaries as a kernel reads them: dense, on the device of the tokens."""
    return None if cu_seqlens is None else cu_seqlens.to(tokens.device).contiguous()
