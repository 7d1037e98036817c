"""Forward and backward of the tiles of a neural memory of two layers by Triton kernels.

The forward pass keeps the state before every GROUP steps; the backward pass walks the groups from
the last to the first and remakes the states of a group's tiles, so that memory grows by one state
per GROUP tiles. Nothing is read back from the device, and nothing is compiled anew for another
length or number of sequences.
"""

import dataclasses
import itertools

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence.triton_problem import target_of
from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.triton_mlp_gradients import (
    mlp_output_gradient_kernel,
    mlp_read_gradient_kernel,
    mlp_reverse_inner_kernel,
    mlp_reverse_norm_kernel,
    mlp_reverse_outer_kernel,
)
from memlm.cuda.neural_memory.triton_mlp_kernels import mlp_read_kernel, mlp_write_kernel
from memlm.cuda.neural_memory.triton_mlp_problem import Layers, Problem, widened

TILES = (16, 32, 64)  # tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """Hidden channels of a slice, warps, and whether all weights stay in registers."""

    BH: int
    num_warps: int
    resident: bool = False


def write_config(C: int, D: int, hidden: int, target: int) -> Config:
    """For the walk that writes: W and S stay in registers where they and the tokens fit."""
    if target >= 90 and C == 16:
        if hidden <= 128 and D * hidden <= 32 * 128:
            return Config(hidden, 8, True)
        return Config(min(hidden, 32), 4)
    if C == 32:
        return Config(min(hidden, 16), 4)
    return walk_config(C, D, hidden, target)


def walk_config(C: int, D: int, hidden: int, target: int) -> Config:
    """For kernels that walk over the slices of a tile."""
    narrow = target < 90 or (target >= 100 and C == 16) or (C == 64 and D < 64)
    return Config(min(hidden, 16 if narrow else 32), 8 if C == 64 else 4)


def reverse_config(C: int, D: int, hidden: int, target: int) -> Config:
    """For one slice of one tile, in the walk backwards."""
    return Config(min(hidden, 16 if target < 90 else 32), 4)


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive steps whose tiles are worked on side by side, and what is written of each tile.

    states: W1, W2, S1, S2 before it, ``[n, D, h]`` and ``[n, h, D]``. x2, e1, e2: see
    triton_mlp_kernels.py. normal, scale: N and r, float32, for the backward pass.
    """

    problem: Problem
    first: int
    stop: int
    states: tuple[Tensor, Tensor, Tensor, Tensor]
    x2: Tensor
    e1: Tensor
    e2: Tensor
    normal: Tensor | None
    scale: Tensor | None

    @classmethod
    def of(cls, problem: Problem, first: int, stop: int, backward: bool = False) -> "Group":
        C, D = problem.sizes
        h = problem.hidden
        tiles = problem.starts[stop] - problem.starts[first]
        return cls(
            problem,
            first,
            stop,
            tuple(problem.empty(tiles, *shape) for shape in ((D, h), (h, D)) * 2),
            problem.empty(tiles, C, h),
            problem.empty(tiles, C, h),
            problem.empty(tiles, C, D),
            problem.empty(tiles, C, D, dtype=torch.float32) if backward else None,
            problem.empty(tiles, C, dtype=torch.float32) if backward else None,
        )

    @property
    def first_tile(self) -> int:
        return self.problem.starts[self.first]

    @property
    def rows(self) -> int:
        return self.problem.counts[self.first]

    def write(self, anchor: Layers, weights: Layers, momentum: Layers) -> None:
        """Walk the steps; the state is overwritten."""
        problem, gates = self.problem, self.problem.gates
        C, D = problem.sizes
        config = write_config(C, D, problem.hidden, problem.target)
        mlp_write_kernel[(self.rows,)](
            problem.k,
            problem.v,
            gates.g_end,
            gates.n,
            gates.beta_end,
            gates.f_end,
            gates.mu_end,
            problem.first_tiles,
            problem.lengths,
            *anchor,
            *weights,
            *momentum,
            *self.states,
            self.x2,
            self.e1,
            self.e2,
            self.normal,
            self.scale,
            self.first,
            self.stop,
            self.first_tile,
            problem.refresh_every,
            CHANNELS=problem.channels,
            D=D,
            HIDDEN=problem.hidden,
            C=C,
            BH=config.BH,
            RESIDENT=config.resident,
            num_warps=config.num_warps,
            num_stages=1,
        )

    def read(self, o: Tensor) -> None:
        """Write the outputs of the tiles."""
        problem, gates = self.problem, self.problem.gates
        C, D = problem.sizes
        config = walk_config(C, D, problem.hidden, problem.target)
        mlp_read_kernel[(self.rows, self.stop - self.first)](
            problem.q,
            problem.k,
            gates.G,
            gates.beta,
            gates.f,
            problem.first_tiles,
            *self.states,
            self.x2,
            self.e1,
            self.e2,
            o,
            self.first,
            self.first_tile,
            CHANNELS=problem.channels,
            D=D,
            HIDDEN=problem.hidden,
            C=C,
            BH=config.BH,
            num_warps=config.num_warps,
            num_stages=1,
        )

    def gradients(
        self,
        anchor: Layers,
        do: Tensor,
        dstate: list[Layers],
        dqkv: tuple[Tensor, Tensor, Tensor],
        dgates: TileGates,
    ) -> None:
        """Write the gradients of the tiles; those of anchor, weights and momentum are overwritten.

        anchor: what the first step found, in the type of the tokens.
        """
        problem, gates = self.problem, self.problem.gates
        C, D = problem.sizes
        h = problem.hidden
        dq, dk, dv = dqkv
        tiles = len(self.e2)
        # What the reads leave for the reverse walk; see the kernels.
        xq, dz1q, dx2, de1 = (problem.empty(tiles, C, h) for _ in range(4))
        dz2q, dz2 = (problem.empty(tiles, C, D) for _ in range(2))
        dk_read, de2 = (problem.empty(tiles, C, D, dtype=torch.float32) for _ in range(2))
        p1, h2 = (problem.empty(tiles, C, C) for _ in range(2))
        config = walk_config(C, D, h, problem.target)
        sizes = {"D": D, "HIDDEN": h, "C": C, "BH": config.BH}
        launch = {"num_warps": config.num_warps, "num_stages": 1}
        grid = (self.rows, self.stop - self.first)
        reads = (
            problem.q,
            problem.k,
            gates.G,
            gates.beta,
            gates.f,
            problem.first_tiles,
            *self.states,
            self.x2,
            self.e1,
        )
        place = (self.first, self.first_tile)
        mlp_output_gradient_kernel[grid](
            *reads,
            self.e2,
            do,
            dgates.G,
            xq,
            dz1q,
            dz2q,
            de2,
            p1,
            h2,
            *place,
            CHANNELS=problem.channels,
            **sizes,
            **launch,
        )
        mlp_read_gradient_kernel[grid](
            *reads,
            do,
            dq,
            dgates.G,
            dgates.beta,
            dgates.f,
            xq,
            dz1q,
            dz2q,
            dk_read,
            dx2,
            de1,
            p1,
            h2,
            *place,
            **sizes,
            **launch,
        )
        config = reverse_config(C, D, h, problem.target)
        sizes["BH"] = config.BH
        launch = {"num_warps": config.num_warps, "num_stages": 1}
        slices = h // config.BH
        for j in reversed(range(self.first, self.stop)):
            rows, start = problem.counts[j], problem.starts[j]
            step = slice(start, start + rows)
            here = slice(start - self.first_tile, start - self.first_tile + rows)
            anchor_step = j - j % problem.refresh_every
            moved = anchor_step >= self.first and anchor_step > 0
            anchors = self.states[:2] if moved else anchor
            anchor_place = problem.starts[anchor_step] - self.first_tile if moved else 0
            dk_parts = problem.empty(2, rows, slices, C, D, dtype=torch.float32)
            de2_parts = problem.empty(rows, slices, C, D, dtype=torch.float32)
            gate_parts = problem.empty(2, rows, 2, slices, C, dtype=torch.float32)
            end_parts = problem.empty(rows, 3, slices, dtype=torch.float32)
            mlp_reverse_inner_kernel[(rows, slices)](
                problem.k,
                gates.g_end,
                gates.n,
                *anchors,
                self.x2,
                self.e1,
                self.e2,
                dx2,
                de1,
                *dstate[1],
                *dstate[2],
                dk_parts[0],
                de2_parts,
                gate_parts[0],
                start,
                self.first_tile,
                anchor_place,
                **sizes,
                **launch,
            )
            mlp_reverse_norm_kernel[(rows,)](
                problem.k,
                problem.v,
                self.normal,
                self.scale,
                de2,
                de2_parts,
                dk_read,
                dz2,
                dv,
                start,
                self.first_tile,
                SLICES=slices,
                CHANNELS=problem.channels,
                D=D,
                C=C,
                num_warps=8 if C * D > 64 * 64 else 4,
                num_stages=1,
            )
            mlp_reverse_outer_kernel[(rows, slices)](
                problem.q,
                problem.k,
                gates.beta,
                gates.f,
                gates.g_end,
                gates.n,
                gates.beta_end,
                gates.f_end,
                gates.mu_end,
                *anchors,
                *self.states,
                self.x2,
                self.e1,
                self.e2,
                xq,
                dz1q,
                dz2q,
                dx2,
                de1,
                dz2,
                *itertools.chain(*dstate),
                dk_parts[1],
                gate_parts[1],
                end_parts,
                start,
                self.first_tile,
                anchor_place,
                int(moved and anchor_step == j),
                int(problem.refresh_every != 1),
                problem.counts[j + 1] if j + 1 < len(problem.counts) else 0,
                **sizes,
                **launch,
            )
            dk[step] = dk_read[here] + dk_parts.sum((0, 2))
            dgates.g_end[step], dgates.n[step] = gate_parts.sum((0, 3)).unbind(1)
            ends = end_parts.sum(2).unbind(1)
            dgates.beta_end[step], dgates.f_end[step], dgates.mu_end[step] = ends


def longest_tile(device: torch.device) -> int:
    """Tokens of the longest tile that keeps its values in registers."""
    return TILES[-1] if target_of(device) >= 90 else TILES[0]


def forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    gates: TileGates,
    anchor: Layers,
    weights: Layers,
    momentum: Layers,
    counts: list[int],
    refresh_every: int,
    save: bool,
) -> tuple[Tensor, Layers, Layers, Layers, list[Tensor]]:
    """Outputs ``[M, C, D]``, anchor of every row's last tile, weights and momentum after it, and
    with `save` what `backward` needs.

    Args:
        Q, K, V: ``[M, C, D]`` of one 16-bit type (float32 in the interpreter).
        anchor, weights, momentum: ``[R, D, h]`` and ``[R, h, D]``, float32.
        counts: rows with a tile at every step, the first R, descending.
        refresh_every: steps between moves of the anchor to the weights; 0: it stays.
    """
    hidden = weights[0].shape[-1]
    problem = Problem.of(Q, K, V, gates, counts, refresh_every, hidden)
    state = [problem.wide_layers(layers) for layers in (anchor, weights, momentum)]
    o = torch.empty_like(problem.q)
    saved = []
    for first, stop in problem.groups():
        group = Group.of(problem, first, stop)
        if save:
            saved += [x[: group.rows].clone() for layers in state for x in layers]
        group.write(*state)
        group.read(o)
    return (
        o[..., : Q.shape[-1]].contiguous(),
        *(problem.true_layers(layers, hidden) for layers in state),
        saved,
    )


def backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    gates: TileGates,
    counts: list[int],
    refresh_every: int,
    saved: list[Tensor],
    dO: Tensor,
    danchor_out: Layers,
    dW_out: Layers,
    dS_out: Layers,
) -> tuple[Tensor, Tensor, Tensor, TileGates, Layers, Layers, Layers]:
    """Gradients of Q, K, V, the gates, anchor, weights and momentum, from those of what `forward`
    returned. That of G is zero above the diagonal."""
    hidden = dW_out[0].shape[-1]
    problem = Problem.of(Q, K, V, gates, counts, refresh_every, hidden)
    do = widened(dO.to(Q.dtype), problem.q.shape[-1])
    dstate = [problem.wide_layers(layers) for layers in (danchor_out, dW_out, dS_out)]
    dqkv = tuple(torch.empty_like(problem.q) for _ in range(3))
    dgates = TileGates(*map(torch.empty_like, problem.gates))
    for place, (first, stop) in reversed(list(enumerate(problem.groups()))):
        A1, A2, W1, W2, S1, S2 = (x.clone() for x in saved[6 * place : 6 * place + 6])
        anchor = tuple(x.to(Q.dtype) for x in saved[6 * place : 6 * place + 2])
        group = Group.of(problem, first, stop, backward=True)
        group.write((A1, A2), (W1, W2), (S1, S2))
        group.gradients(anchor, do, dstate, dqkv, dgates)
    return (
        *(x[..., : Q.shape[-1]].contiguous() for x in dqkv),
        dgates,
        *(problem.true_layers(layers, hidden) for layers in dstate),
    )
