"""Launches of the linear neural memory's kernels: forward and backward over the tiles of all rows.

The backward pass keeps no state per tile: `forward` saves the float32 weights and momentum at the
start of segments of steps, and `backward` walks through every segment again, the last one first.
A segment's tiles take at most SEGMENT_BYTES of states while it is worked on (or eight steps, where
these need more); a checkpoint is 8 D^2 bytes per row and segment.

Nothing here reads a number back from the device, and nothing is compiled anew for other counts.
"""

import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.linear_recurrence.triton_problem import target_of
from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import KERNEL_WIDTHS
from memlm.cuda.neural_memory.triton_linear_kernels import (
    linear_gradient_kernel,
    linear_prepare_kernel,
    linear_reverse_scan_kernel,
    linear_scan_kernel,
)

LONGEST_TILE = 64
ALIGNMENT = 16  # of channels, so that loads are whole
SEGMENT_BYTES = 1 << 28
LEAST_STEPS = 8  # of a segment


def forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    gates: TileGates,
    anchor: Tensor | None,
    weights: Tensor,
    momentum: Tensor,
    counts: list[int],
    refresh_every: int,
    exact: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor]]:
    """Outputs, the states of every row after its last tile, and what `backward` needs.

    Args:
        Q, K, V: ``[M, C, D]``, bfloat16 or float16; empty slots zero.
        gates: float32.
        anchor, weights, momentum: float32 ``[R, D, D]``; anchor None if `exact`.
        counts: rows active at every step, descending, R = counts[0], M their sum.
        refresh_every: steps between refreshes of the anchor, 0 = never.

    Returns:
        O ``[M, C, D]``, the anchor of a row's last tile (None if `exact`), weights, momentum
        (float32), and, if `save`, the checkpoints and the inverses of the exact system.
    """
    C, D = Q.shape[1:]
    problem = _Problem.of(Q, K, V, gates, counts, refresh_every, exact)
    prepared = problem.prepare()
    outputs = torch.empty_like(problem.K)
    # The states change in place, from segment to segment.
    anchor_out, *ends = (problem.states(x, copy=True) for x in (anchor, weights, momentum))
    anchor = problem.states(anchor)
    kept = []
    for start, stop in problem.segments if save else [(0, len(counts))]:
        active = [x[: counts[start]] for x in ends]
        kept.append([x.clone() for x in active] if save else [])
        problem.scan(prepared, anchor, active, start, stop, outputs=(outputs, anchor_out, *active))
    saved = [torch.cat(x) for x in zip(*kept, strict=True)]
    if save and exact:
        saved.append(prepared[1])
    found = (None if x is None else x[:, :D, :D].contiguous() for x in (anchor_out, *ends))
    return outputs[:, :C, :D].contiguous(), *found, saved


def backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    gates: TileGates,
    anchor: Tensor | None,
    counts: list[int],
    refresh_every: int,
    exact: bool,
    saved: list[Tensor],
    dO: Tensor,
    danchor_out: Tensor | None,
    dW_out: Tensor,
    dS_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, TileGates, Tensor | None, Tensor, Tensor]:
    """Gradients of Q, K, V, the gates, anchor (None if `exact`), weights and momentum.

    The gradient of G is zero above the diagonal.
    """
    C, D = Q.shape[1:]
    problem = _Problem.of(Q, K, V, gates, counts, refresh_every, exact)
    anchor = problem.states(anchor)
    # The kernels work on these in place.
    dstates = [problem.states(x, copy=True) for x in (danchor_out, dW_out, dS_out)]
    dO = problem.tokens(dO.to(Q.dtype))
    prepared = problem.prepare(saved[2] if exact else None)
    dtokens = [torch.empty_like(problem.K) for _ in range(3)]
    dgates = TileGates(*(torch.empty_like(x) for x in problem.gates))
    rows = [counts[start] for start, _ in problem.segments]
    starts = zip(*(x.split(rows) for x in saved[:2]), strict=True)
    for (start, stop), states in reversed(list(zip(problem.segments, starts, strict=True))):
        buffers = _Buffers.of(problem, start, stop)
        problem.scan(prepared, anchor, states, start, stop, buffers=buffers)
        problem.reverse_scan(prepared, dO, dstates, dtokens[2], start, stop, buffers)
        problem.gradients(dO, dtokens, dgates, start, stop, buffers)
    if problem.fresh:
        # Only the first tiles read the anchor given; other anchors went into the weights.
        longer = counts[1] if len(counts) > 1 else 0
        first = torch.bmm(problem.K[: counts[0]].mT.float(), dtokens[2][: counts[0]].float())
        dstates[0][:longer].zero_()
        dstates[0] -= first
    dQ, dK, dV = (x[:, :C, :D].contiguous() for x in dtokens)
    dgates = TileGates(*(x[(slice(None), *[slice(C)] * (x.ndim - 1))] for x in dgates))
    return dQ, dK, dV, dgates, *(None if x is None else x[:, :D, :D] for x in dstates)


@dataclasses.dataclass(frozen=True)
class _Config:
    """BD and BE channels of a block, warps and pipeline stages."""

    BD: int
    BE: int
    num_warps: int
    num_stages: int


def _pad(x: Tensor, *after: int) -> Tensor:
    """x with this many zeros after its last dimensions, contiguous; x itself where it is that."""
    if any(after):
        x = F.pad(x, [n for size in reversed(after) for n in (0, size)])
    return x.contiguous()


def _block(size: int, D: int) -> int:
    return min(size, max(16, triton.next_power_of_2(D)))


def _scan_config(D: int, target: int, exact: bool, reverse: bool = False) -> _Config:
    """For the two scans: the blocks [BD, BE] of the states stay in registers."""
    BE, num_warps, num_stages = 32, 4, 2
    if D > 128:
        BE, num_warps = 16, 4 if target // 10 == 9 else 8
        if target >= 100 and not reverse:
            num_stages = 2 if exact else 3  # exact: a third would not fit into shared memory
        elif target >= 100 and exact:
            BE = 8
    elif D > 64:
        BE, num_warps = (32, 8) if target >= 90 else (16, 4)
    return _Config(_block(KERNEL_WIDTHS[1], D), _block(BE, D), num_warps, num_stages)


def _gradient_config(D: int, target: int) -> _Config:
    """For the gradients of a tile: four to six sums [C, BD] stay in registers."""
    return _Config(_block(32 if target >= 90 else 16, D), _block(32, D), 8, 1)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One call as the kernels take it, padded to whole tiles and blocks.

    Attributes:
        starts: the first tile of every step, and the number of tiles.
        firsts, lengths: the same int64 ``[steps]`` and the steps of every row, int32 ``[R]``, on
            the device; None where all rows are equally long.
        segments: first and last step (excluded) of the segments of the backward pass.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    gates: TileGates
    counts: list[int]
    refresh_every: int
    exact: bool
    starts: list[int]
    firsts: Tensor | None
    lengths: Tensor | None
    segments: list[tuple[int, int]]

    @classmethod
    def of(
        cls,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        gates: TileGates,
        counts: list[int],
        refresh_every: int,
        exact: bool,
    ) -> "_Problem":
        C, D = Q.shape[1:]
        C_pad = max(16, triton.next_power_of_2(C)) - C
        D_pad = -D % ALIGNMENT
        Q, K, V = (_pad(x, C_pad, D_pad) for x in (Q, K, V))
        gates = TileGates(*(_pad(x.float(), *[C_pad] * (x.ndim - 1)) for x in gates))
        starts = [0, *itertools.accumulate(counts)]
        firsts = lengths = None
        if counts[-1] < counts[0]:
            firsts = torch.tensor(starts[:-1], device=Q.device)
            steps = [bisect_left(counts, -row, key=lambda c: -c) for row in range(counts[0])]
            lengths = torch.tensor(steps, dtype=torch.int32, device=Q.device)
        segments = segments_of(counts, D + D_pad, 0 if exact else refresh_every)
        return cls(Q, K, V, gates, counts, refresh_every, exact, starts, firsts, lengths, segments)

    @property
    def C(self) -> int:
        return self.K.shape[1]

    @property
    def D(self) -> int:
        return self.K.shape[2]

    @property
    def fresh(self) -> bool:
        """Whether every tile but a row's first takes the weights at its start as the anchor."""
        return self.refresh_every == 1 and not self.exact

    @property
    def target(self) -> int:
        """See `target_of`."""
        return target_of(self.K.device)

    @property
    def sizes(self) -> dict[str, int]:
        return {"D": self.D, "C": self.C}

    def tokens(self, x: Tensor) -> Tensor:
        """x ``[M, C, D]`` padded."""
        return _pad(x, self.C - x.shape[1], self.D - x.shape[2])

    def states(self, x: Tensor | None, copy: bool = False) -> Tensor | None:
        """x ``[R, D, D]`` in float32, padded; not the same memory if `copy`."""
        if x is None:
            return None
        pad = self.D - x.shape[2]
        wide = _pad(x.float(), pad, pad)
        return wide.clone() if copy and wide.data_ptr() == x.data_ptr() else wide

    def prepare(self, inverse: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(Q K^T) * G and the inverse of the exact system; an inverse that was kept is taken."""
        scores = self.K.new_empty(len(self.K), self.C, self.C)
        solve = self.exact and inverse is None
        if solve:
            inverse = torch.empty_like(scores)
        linear_prepare_kernel[(len(self.K),)](
            self.Q,
            self.K,
            self.gates.G,
            scores,
            inverse if solve else None,
            **self.sizes,
            BD=_block(64, self.D),
            num_warps=4,
            num_stages=1,
        )
        return scores, inverse

    def scan(
        self,
        prepared: tuple[Tensor, Tensor | None],
        anchor: Tensor | None,
        states: Sequence[Tensor],
        start: int,
        stop: int,
        outputs: Sequence[Tensor | None] = (None,) * 4,
        buffers: "_Buffers | None" = None,
    ) -> None:
        """Walk through some steps from the weights and momentum at their start."""
        config = _scan_config(self.D, self.target, self.exact)
        linear_scan_kernel[(self.counts[start] * triton.cdiv(self.D, config.BE),)](
            self.Q,
            self.K,
            self.V,
            *prepared,
            *self.gates[1:],
            anchor,
            *states,
            self.firsts,
            self.lengths,
            *outputs,
            *((None,) * 4 if buffers is None else buffers.written_forward),
            self.counts[0],
            start,
            stop,
            len(self.counts),
            self.starts[start],
            0 if buffers is None else buffers.anchors,
            self.refresh_every,
            **self.sizes,
            FRESH=self.fresh,
            **dataclasses.asdict(config),
        )

    def reverse_scan(
        self,
        prepared: tuple[Tensor, Tensor | None],
        dO: Tensor,
        dstates: Sequence[Tensor | None],
        dV: Tensor,
        start: int,
        stop: int,
        buffers: "_Buffers",
    ) -> None:
        """Walk back through some steps; dstates and dV change in place."""
        config = _scan_config(self.D, self.target, self.exact, reverse=True)
        linear_reverse_scan_kernel[(self.counts[start] * triton.cdiv(self.D, config.BE),)](
            self.Q,
            self.K,
            *prepared,
            *self.gates[1:],
            dO,
            *dstates,
            self.firsts,
            self.lengths,
            dV,
            buffers.weight_gradients,
            buffers.momentum_gradients,
            self.counts[0],
            start,
            stop,
            len(self.counts),
            self.starts[start],
            self.refresh_every,
            **self.sizes,
            FRESH=self.fresh,
            **dataclasses.asdict(config),
        )

    def gradients(
        self,
        dO: Tensor,
        dtokens: list[Tensor],
        dgates: TileGates,
        start: int,
        stop: int,
        buffers: "_Buffers",
    ) -> None:
        """Write the gradients of queries, keys and gates of some steps."""
        config = _gradient_config(self.D, self.target)
        linear_gradient_kernel[(self.starts[stop] - self.starts[start],)](
            self.Q,
            self.K,
            *self.gates[:5],
            dO,
            dtokens[2],
            buffers.errors,
            buffers.weight_states,
            buffers.momentum_states,
            buffers.anchor_slots,
            buffers.weight_gradients,
            buffers.momentum_gradients,
            *dtokens[:2],
            *dgates,
            self.starts[start],
            buffers.anchors,
            **self.sizes,
            **dataclasses.asdict(config),
        )


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """What the scans of one segment write for its gradients, in the type of the inputs.

    weight_states holds the anchors given before the weights at the start of every tile.
    """

    anchors: int
    weight_states: Tensor
    momentum_states: Tensor
    anchor_slots: Tensor | None
    errors: Tensor
    weight_gradients: Tensor
    momentum_gradients: Tensor

    @classmethod
    def of(cls, problem: _Problem, start: int, stop: int) -> "_Buffers":
        tiles = problem.starts[stop] - problem.starts[start]
        anchors = 0 if problem.exact else problem.counts[start]
        C, D, empty = problem.C, problem.D, problem.K.new_empty
        return cls(
            anchors,
            empty(anchors + tiles, D, D),
            empty(tiles, D, D),
            None if problem.exact else empty(tiles, dtype=torch.int32),
            empty(tiles, C, D),
            empty(tiles, D, D),
            empty(tiles, D, D),
        )

    @property
    def written_forward(self) -> tuple[Tensor | None, ...]:
        return self.weight_states, self.momentum_states, self.anchor_slots, self.errors


def segments_of(counts: list[int], D: int, refresh_every: int) -> list[tuple[int, int]]:
    """First and last step (excluded) of the segments of the backward pass. Where anchors are
    refreshed, a segment starts with that."""
    limit = SEGMENT_BYTES // (8 * D * D)  # W, S, dW and dS of a tile, two bytes each
    starts, tiles = [0], 0
    for j, count in enumerate(counts):
        long_enough = j - starts[-1] >= LEAST_STEPS
        if long_enough and tiles + count > limit and j % max(refresh_every, 1) == 0:
            starts.append(j)
            tiles = 0
        tiles += count
    return list(itertools.pairwise([*starts, len(counts)]))
