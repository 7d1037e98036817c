"""Long sequences cut into segments, scanned side by side where few would leave a card empty."""

import dataclasses
import functools
import os

import torch
from torch import Tensor

from memlm.cuda.dispatch import interpreting
from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs
from memlm.cuda.linear_recurrence.triton_launchers import Prepared, reverse_scan, scan
from memlm.cuda.linear_recurrence.triton_problem import Problem, scan_config, target_of

SPLIT_VARIABLE = "MEMLM_SEQUENCE_SPLIT"
SEGMENT = 1024  # fewest tokens of a segment of a split sequence


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def segments(inputs: Inputs) -> int:
    """Into how many segments each sequence is cut so that the scans fill the card; 1: not at all.

    Set ``MEMLM_SEQUENCE_SPLIT=0`` to never cut: a row's results then do not depend, in the last
    bit, on the rows beside it.
    """
    if os.environ.get(SPLIT_VARIABLE) == "0" or inputs.v.device.type != "cuda" or interpreting():
        return 1
    if inputs.sequences == 0:
        return 1
    _, T, _, HV, K, V = inputs.sizes
    tiles = -(-V // scan_config(K, V, target_of(inputs.v.device)).BV)
    programs = inputs.sequences * HV * tiles
    length = T // inputs.sequences if inputs.cu_seqlens is not None else T
    return max(1, min(_processors(inputs.v.device) // max(1, programs), length // SEGMENT))


def segment_slots(inputs: Inputs, count: int) -> int:
    """Segments in all, used or not."""
    B, T = inputs.sizes[:2]
    if inputs.cu_seqlens is None:
        return B * count
    return T // segment_length(inputs, count) + inputs.sequences


def segment_length(inputs: Inputs, count: int) -> int:
    """Tokens of a segment: whole chunks."""
    T = inputs.sizes[1]
    length = T // inputs.sequences if inputs.cu_seqlens is not None else T
    return -(-length // (count * CHUNK)) * CHUNK


@dataclasses.dataclass(frozen=True)
class Split:
    """Sequences cut into segments that are scanned side by side.

    A segment maps its start state S to M S + B, exactly: M is what the scan makes of the identity
    with zero values, B what it makes of zero. The start states of all segments follow from these
    by one small product per segment.

    problem: the same tokens with segments for sequences (unused segments are empty).
    owner: int64 [segments], the sequence of each segment; fresh: bool, whether it is the first.
    final: int64 [sequences], the last segment of each.
    """

    problem: Problem
    owner: Tensor
    fresh: Tensor
    final: Tensor

    @classmethod
    def of(cls, problem: Problem, count: int) -> "Split":
        inputs = problem.inputs
        B, T = inputs.sizes[:2]
        device = problem.v.device
        length, rows = segment_length(inputs, count), segment_slots(inputs, count)
        every = torch.arange(rows, device=device)
        if inputs.cu_seqlens is None:
            owner, place = every // count, every % count
            start, end = owner * T, (owner + 1) * T
            final = torch.arange(B, device=device) * count + count - 1
        else:
            bounds = inputs.cu_seqlens.to(device).long()
            starts, ends = bounds[:-1], bounds[1:]
            first = starts // length + torch.arange(len(starts), device=device)
            owner = torch.searchsorted(first, every, right=True) - 1
            place = every - first[owner]
            start, end = starts[owner], ends[owner]
            final = torch.cat((first[1:], every.new_full((1,), rows))) - 1
        begins = torch.minimum(start + place * length, end)
        boundaries = torch.cat((begins, every.new_full((1,), B * T)))
        return cls(problem.packed(boundaries), owner, place == 0, final)

    def start_states(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Start state of every segment and its map M [segments, HV, K, K]."""
        inputs = self.problem.inputs
        _, _, _, HV, K, _ = inputs.sizes
        rows = self.problem.sequences
        eye = torch.eye(K, device=self.owner.device, dtype=torch.float32).expand(rows, HV, K, K)
        maps = scan(self.problem, prepared, eye, zero_values=True)
        added = scan(self.problem, prepared, None)
        fresh = torch.zeros_like(added)
        if inputs.initial_state is not None:
            fresh = inputs.initial_state.float().index_select(0, self.owner)
        starts = torch.empty_like(added)
        state = fresh[0]
        for row in range(rows):
            state = torch.where(self.fresh[row], fresh[row], state)
            starts[row] = state
            state = torch.baddbmm(added[row], maps[row], state)
        return starts, maps

    def end_gradients(self, prepared: Prepared, maps: Tensor, do: Tensor, dstate: Tensor) -> Tensor:
        """Gradient of the end state of every segment, from those of the final states."""
        added = reverse_scan(self.problem, prepared, do, None)
        ends = torch.zeros_like(added).index_copy(0, self.final, dstate)
        gradient = torch.zeros_like(added[0])
        for row in reversed(range(self.problem.sequences)):
            ends[row] += gradient
            gradient = torch.baddbmm(added[row], maps[row].mT, ends[row])
            gradient = torch.where(self.fresh[row], 0.0, gradient)
        return ends

    def last(self, ends: Tensor) -> Tensor:
        """The final states of the sequences."""
        return ends.index_select(0, self.final)

    def first(self, starts: Tensor) -> Tensor:
        """Of one row per segment, those of the segments that begin a sequence."""
        begins = torch.cat((self.final.new_zeros(1), self.final[:-1] + 1))
        return starts.index_select(0, begins)
