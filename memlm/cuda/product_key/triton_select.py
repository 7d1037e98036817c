"""The selection in Triton: scores never reach memory, only the k best of every half do.

16-bit inputs are multiplied as they are and summed in float32. What else there is, is cut into
three bfloat16 parts, which together have the 24 bits of float32, and multiplied part by part: as
exact as float32 (products below its last bit are left out), on the matrix units.
"""

import dataclasses

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.dispatch import capability, interpreting
from memlm.cuda.product_key.triton_kernels import (
    chunks_kernel,
    halves_kernel,
    pairs_kernel,
    split_kernel,
)
from memlm.cuda.weighted_bag import Reads, triton_bag, triton_rows

PARTS = 3
ROWS_OF_A_WARP = 16  # tokens of a tile of scores: a row of it then stays in one warp, or in two
ENOUGH_PROGRAMS = 264  # two for each of 132 multiprocessors


def forward(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.product_key_select`."""
    tokens, heads = query.shape[:2]
    indices = torch.empty(tokens, heads, k, dtype=torch.int32, device=query.device)
    weights = torch.empty(tokens, heads, k, dtype=torch.float32, device=query.device)
    if indices.numel() == 0:
        return indices, weights
    n = sub_keys.shape[2]
    scores, places = _best_halves(query, sub_keys, max(4, triton.next_power_of_2(k)))
    log_kept = _log2(scores.shape[-1])
    pairs = sum(k // (i + 1) for i in range(k))
    log_rows = 3
    with torch.cuda.device_of(query):
        pairs_kernel[(triton.cdiv(tokens * heads, 2**log_rows),)](
            scores,
            places,
            indices,
            weights,
            tokens * heads,
            n,
            k,
            pairs,
            log_rows,
            max(log_kept, _log2(triton.next_power_of_2(pairs))),
            log_kept,
            num_warps=4,
        )
    return indices, weights


def backward(
    query: Tensor, sub_keys: Tensor, indices: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and sub_keys: bags of half keys, and of what reads each of them."""
    tokens, heads, k = indices.shape
    n, half = sub_keys.shape[2:]
    dtype = query.dtype if query.dtype == sub_keys.dtype else torch.float32
    query, table = query.to(dtype).reshape(-1, half), sub_keys.to(dtype).reshape(-1, half)
    lists = torch.arange(2 * heads, dtype=torch.int32, device=indices.device) * n
    rows = torch.stack((indices // n, indices % n), 2) + lists.view(heads, 2, 1)
    rows = rows.view(-1, k)  # [T * H * 2, k]
    weights = dscores[:, :, None].expand(tokens, heads, 2, k).reshape(-1, k)
    dquery, _ = triton_bag.bag(rows, weights, table, None)
    dkeys = triton_rows.dense_gradient([Reads(rows, weights, query)], len(table))
    return dquery.view(tokens, heads, 2, half), dkeys.view(sub_keys.shape)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How `halves_kernel` is launched; registers: of a thread, at most."""

    warps: int
    chunks: int
    width: int
    registers: int


def _best_halves(query: Tensor, sub_keys: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Scores and places [T, H, 2, kept] of the best half keys, sorted."""
    tokens, heads = query.shape[:2]
    n = sub_keys.shape[2]
    fp16 = query.dtype == sub_keys.dtype == torch.float16
    query_parts, key_parts = _parts(query, fp16), _parts(sub_keys, fp16)
    width = key_parts.shape[-1]
    log_kept, block_n = _log2(kept), max(32, kept)
    whole = len(query_parts) == len(key_parts) == 1
    tiles = _tiles(query.device, tokens, 2 * heads, n, kept, whole)
    shape = (tokens, heads, 2, tiles.chunks, kept)
    scores = torch.empty(shape, dtype=torch.float32, device=query.device)
    places = torch.empty(shape, dtype=torch.int32, device=query.device)
    block = tiles.warps * ROWS_OF_A_WARP
    with torch.cuda.device_of(query):
        halves_kernel[(2 * heads * tiles.chunks * triton.cdiv(tokens, block),)](
            query_parts,
            key_parts,
            scores,
            places,
            tokens,
            query_parts.stride(0),
            2 * heads,
            tiles.chunks,
            n,
            width,
            len(query_parts),
            len(key_parts),
            _log2(block),
            _log2(block_n),
            log_kept,
            BLOCK_D=next(size for size in (64, 32, 16) if size <= tiles.width and not width % size),
            WIDE=interpreting(),  # which cannot multiply bfloat16
            num_warps=tiles.warps,
            maxnreg=tiles.registers,
        )
        if tiles.chunks == 1:
            return scores[..., 0, :], places[..., 0, :]
        best_scores, best_places = (found.new_empty(*shape[:3], kept) for found in (scores, places))
        chunks_kernel[(2 * tokens * heads,)](
            scores,
            places,
            best_scores,
            best_places,
            _log2(tiles.chunks * kept),
            log_kept,
            num_warps=4,
        )
    return best_scores, best_places


def _tiles(device: torch.device, tokens: int, lists: int, n: int, kept: int, whole: bool) -> _Tiles:
    """Large tiles; small ones where tokens are few, and chunks of lists where they are very few.

    Registers and widths are those with which nothing spills (`benchmarks.compile_all`).
    """
    if lists * triton.cdiv(tokens, 8 * ROWS_OF_A_WARP) >= ENOUGH_PROGRAMS:
        if capability(device) // 10 in (9, 10):
            return _Tiles(8, 1, 64 if whole else 32, 128 if kept <= 32 else 255)
        # The matrix units of other cards take what they multiply from registers.
        warps, registers = (4, 168) if kept <= 32 else (8, 255)
        return _Tiles(warps, 1, 32 if whole else 16, registers)
    few = lists * triton.cdiv(tokens, ROWS_OF_A_WARP) < ENOUGH_PROGRAMS // 2
    chunks = 1
    while few and chunks < 16 and n // (2 * chunks) >= 64:
        chunks *= 2
    return _Tiles(1, chunks, 32 if whole else 16, 255)


def _parts(x: Tensor, fp16: bool) -> Tensor:
    """Parts [parts, ..., width] of x [..., D] for `halves_kernel`, whole 16s of channels."""
    D = x.shape[-1]
    width = triton.cdiv(D, 16) * 16
    if fp16 or x.dtype == torch.bfloat16:
        return F.pad(x, (0, width - D)).contiguous()[None]
    x = x.contiguous()
    parts = torch.empty(PARTS, *x.shape[:-1], width, dtype=torch.bfloat16, device=x.device)
    block = 1024
    with torch.cuda.device_of(x):
        split_kernel[(triton.cdiv(parts[0].numel(), block),)](
            x, parts, parts[0].numel(), D, width, block
        )
    return parts


def _log2(power: int) -> int:
    return power.bit_length() - 1
