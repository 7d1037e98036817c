"""What the kernels read: queries in parts, vectors beside the keys, and the cut into tiles."""

import dataclasses

import torch
import triton
from torch import Tensor

from memlm.cuda.topk_search.inputs import Positions
from memlm.cuda.topk_search.triton_kernels import norms_kernel

ENOUGH_PROGRAMS = 528  # four for each of 132 multiprocessors
MOST_LANES = 4096  # per query, but where so few programs would not fill a card
# Bytes that the top-k moves for a lane, and looking through again for a number of a key.
LANE_TRAFFIC, REPAIR_TRAFFIC = 160, 24
# bfloat16 parts that have all bits of a type.
PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1, torch.int8: 1}
LEAST_LENGTH = 1e-12  # of a vector, where the metric divides by it


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the lanes are cut: each of `splits` has `per_split` tiles of block_n keys."""

    block_m: int
    block_n: int
    splits: int
    per_split: int
    warps: int

    @property
    def lanes(self) -> int:
        """Per query."""
        return self.splits * self.block_n

    @staticmethod
    def choose(batch: int, tokens: int, stored: int, width: int, k: int) -> "Tiles":
        """So many splits that results seldom share a lane and that programs fill a card.

        Of L lanes about k^2 / 2L with stored / L keys each are looked through again; the chosen
        L makes the bytes of that and of the top-k of all lanes the fewest.
        """
        block_m, block_n, warps = 128, 32, 8
        if tokens <= 64:
            block_m, block_n, warps = (16, 64, 4) if tokens <= 16 else (64, 32, 4)
        tiles = triton.cdiv(stored, block_n)
        programs = batch * triton.cdiv(tokens, block_m)
        cheapest = (k * k * stored * width * REPAIR_TRAFFIC / LANE_TRAFFIC) ** (1 / 3)
        lanes = min(MOST_LANES, max(8 * k, int(cheapest)))
        splits = max(triton.cdiv(ENOUGH_PROGRAMS, programs), triton.cdiv(lanes, block_n))
        per_split = triton.cdiv(tiles, min(splits, tiles))
        return Tiles(block_m, block_n, triton.cdiv(tiles, per_split), per_split, warps)


@dataclasses.dataclass(frozen=True)
class Queries:
    """Some queries [B, T, D] of every row.

    parts: [parts, B, T, D], which add up to them. factors: float32 [B, T] or None.
    first, last: int64 [B, T], bounds of the positions they see, or None.
    """

    parts: Tensor
    factors: Tensor | None
    first: Tensor | None
    last: Tensor | None

    @staticmethod
    def prepare(
        queries: Tensor, key_type: torch.dtype, metric: str, reach: tuple[Tensor, Tensor] | None
    ) -> "Queries":
        """reach: first and last."""
        factors = None
        if metric == "cosine":
            factors = queries.float().norm(dim=-1).clamp(min=LEAST_LENGTH).reciprocal()
        first, last = (x.contiguous() for x in reach) if reach else (None, None)
        same = queries.dtype == torch.float16 and key_type in (torch.float16, torch.int8)
        if same or queries.dtype == torch.bfloat16:
            return Queries(queries.contiguous()[None], factors, first, last)
        parts = []
        rest = queries.float()
        for _ in range(PARTS[queries.dtype]):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        return Queries(torch.stack(parts), factors, first, last)


@dataclasses.dataclass(frozen=True)
class Store:
    """Keys [B, M, D], rows side by side; stores lie `stride` keys apart.

    A score is (2 if twice) * queries' factor * factors * (query . key) + offsets; factors and
    offsets are float32 [B, M] or None. tile_bounds: int64 [B, 2, tiles], the lowest and highest
    of the key positions in every tile.
    """

    keys: Tensor
    stride: int
    factors: Tensor | None
    offsets: Tensor | None
    twice: bool
    valid: Tensor | None
    key_positions: Tensor | None
    tile_bounds: Tensor | None

    @staticmethod
    def prepare(
        keys: Tensor,
        metric: str,
        valid: Tensor | None,
        positions: Positions | None,
        scales: Tensor | None,
        block_n: int,
    ) -> "Store":
        """See `memlm.cuda.topk_search`; block_n: keys of a tile."""
        stored, D = keys.shape[1:]
        side_by_side = keys.stride(2) == 1 and keys.stride(1) == D
        if not side_by_side or keys.stride(0) % D:
            keys = keys.contiguous()
        factors, offsets = scales, None
        if metric == "l2":
            offsets = -_norms(keys)
            offsets = offsets if scales is None else offsets * scales.square()
        elif metric == "cosine":
            lengths = _norms(keys).sqrt()
            scales = torch.ones_like(lengths) if scales is None else scales
            factors = scales / (lengths * scales.abs()).clamp(min=LEAST_LENGTH)
        key_positions = bounds = None
        if positions is not None:
            key_positions = positions[0].contiguous()
            # The last tile is filled up with its own last position.
            missing = -stored % block_n
            filling = key_positions[:, -1:].expand(-1, missing)
            tiled = torch.cat((key_positions, filling), 1).view(len(keys), -1, block_n)
            bounds = torch.stack((tiled.amin(-1), tiled.amax(-1)), 1)
        return Store(
            keys,
            keys.stride(0) // D,
            None if factors is None else factors.contiguous(),
            offsets,
            metric == "l2",
            None if valid is None else valid.contiguous(),
            key_positions,
            bounds,
        )

    def select(self, rows: slice) -> "Store":
        """The stores of some rows."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: x[rows] for name, x in fields.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors)


def _norms(keys: Tensor) -> Tensor:
    """float32 [B, M]: squared lengths."""
    batch, stored, D = keys.shape
    norms = torch.empty(batch, stored, device=keys.device)
    block_d = min(64, max(16, triton.next_power_of_2(D)))
    rows = 128
    with torch.cuda.device_of(keys):
        norms_kernel[(batch * triton.cdiv(stored, rows),)](
            keys, norms, stored, keys.stride(0) // D, D, rows, block_d, num_warps=4
        )
    return norms
