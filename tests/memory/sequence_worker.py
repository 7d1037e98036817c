"""What every process does in test_sequence_recurrences.py: a memory whose rows it holds in part."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from memlm.cuda.dispatch import VARIABLE
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.sequence_group import SequenceGroup
from memlm.memory import MemoryModule, MemoryState, memory_class, memory_config

HIDDEN = 16
Results = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The documents of a call: padding "." in rows, a letter for every other token, a capital
    where a document starts. Positions go on from `first` in the rows."""

    rows: tuple[str, ...]
    first: int = 0

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, validity and starts, [B, T]."""
        shape = (len(self.rows), len(self.rows[0]))
        positions = torch.zeros(shape, dtype=torch.int64)
        valid, starts = (torch.zeros(shape, dtype=torch.bool) for _ in "vs")
        for i, row in enumerate(self.rows):
            position = self.first
            for j, token in enumerate(row):
                valid[i, j], starts[i, j] = token != ".", token.isupper()
                position = 0 if token.isupper() else position
                positions[i, j] = position
                position += token != "."
        return positions, valid, starts

    def context(self, columns: slice, sequence: SequenceGroup | None, write: bool) -> CallContext:
        """A call with some columns of these rows."""
        positions, valid, starts = (part[:, columns] for part in self.parts())
        layout = SequenceLayout.build(positions, valid, starts)
        return CallContext(layout, positions, write=write, sequence=sequence)


@dataclasses.dataclass(frozen=True)
class Case:
    """Memories by name, run over calls one after another.

    tolerance: of the largest difference, relative to the largest number of a tensor.
    """

    memories: dict[str, dict[str, Any]]
    calls: tuple[Rows, ...]
    dtype: str = "float64"
    tolerance: float = 1e-9
    write: bool = True
    implementation: str = "eager"  # with which no native library has to be built


def compare(cases: dict[str, Case]) -> dict[str, float]:
    """The differences between whole rows and shared ones, in tolerances, by case, memory, call and
    tensor."""
    sequence = SequenceGroup(dist.group.WORLD)
    found = {}
    for label, case in cases.items():
        os.environ[VARIABLE] = case.implementation
        for name, spec in case.memories.items():
            whole, shared = (_run(spec, case, group) for group in (None, sequence))
            for key, expected in whole.items():
                assert shared[key].shape == expected.shape, key
                if expected.numel():
                    difference = (shared[key] - expected).abs().max()
                    error = difference / expected.abs().max().clamp(min=1e-3)
                    found[f"{label}, {name}: {key}"] = float(error) / case.tolerance
    return found


def _run(spec: dict[str, Any], case: Case, sequence: SequenceGroup | None) -> Results:
    """Outputs and gradients of whole rows and the last states, of one call after another.

    Where processes share rows, every one contributes its columns and the last one the states.
    """
    torch.manual_seed(0)
    calls, dtype = case.calls, getattr(torch, case.dtype)
    memory = memory_class(spec["type"]).build(memory_config(spec), HIDDEN)
    _randomize(memory, dtype)
    parameters = {name: x for name, x in memory.named_parameters() if x.requires_grad}
    size = len(calls[0].rows)
    state = memory.init_state(size, dtype=dtype)
    state = type(state).from_state_dict(
        # Positive, as sums of what a normalizer sums.
        {name: torch.rand_like(x) for name, x in state.tensors().items()}
    )
    last = sequence is None or sequence.is_last
    results: Results = {}
    for number, rows in enumerate(calls):
        length = len(rows.rows[0])
        columns = slice(0, length) if sequence is None else sequence.columns(length)
        hidden = torch.randn(size, length, HIDDEN, dtype=dtype)
        weights = torch.randn_like(hidden)
        hidden.requires_grad_()
        given = {name: x.detach().requires_grad_() for name, x in state.tensors().items()}
        context = rows.context(columns, sequence, case.write)
        initial = type(state).from_state_dict(given)
        output, state = memory(hidden[:, columns], initial, context)
        assert case.write or state is initial
        loss = (output * weights[:, columns]).masked_fill(~context.layout.valid[..., None], 0).sum()
        for x in state.tensors().values():
            # Every process's random numbers stay the same as with whole rows.
            loss = loss + (x * torch.randn_like(x)).sum() * last
        leaves = {"hidden": hidden, **given, **parameters}
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        whole = torch.zeros_like(hidden)
        whole[:, columns] = output.detach().masked_fill(~context.layout.valid[..., None], 0)
        state = _last(state.detach(), sequence)
        sums = {"output": whole}
        sums |= {f"d {name}": x.clone() for name, x in zip(leaves, gradients, strict=True)}
        if sequence is not None:
            for x in sums.values():
                dist.all_reduce(x)
        sums |= state.tensors()
        results |= {f"{number} {name}": x for name, x in sums.items()}
    return results


def _last(state: MemoryState, sequence: SequenceGroup | None) -> MemoryState:
    """The state of the last process."""
    if sequence is None:
        return state
    tensors = {name: sequence.all(x)[-1] if x.numel() else x for name, x in state.tensors().items()}
    return type(state).from_state_dict(tensors)


def _randomize(memory: MemoryModule, dtype: torch.dtype) -> None:
    """Parameters of all kinds, the same on all processes."""
    memory.to(dtype)
    with torch.no_grad():
        for name, x in memory.named_parameters():
            if name not in ("A_log", "dt_bias"):
                x.copy_(torch.randn_like(x) / x.shape[-1] ** 0.5)
