"""Passes states of layers between the processes that hold the rows of a call together.

Process r receives the state after the columns of process r - 1, and hands its own on to process
r + 1. Gradients of the states go the other way.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from memlm.layers.sequence_group import SequenceGroup
from memlm.layers.state import MemoryState

States = dict[str, MemoryState]
# Names of a state and of a tensor in it, and the shape and type of that tensor.
Shapes = list[tuple[str, str, tuple[int, ...], torch.dtype]]


def share_states(states: Mapping[str, MemoryState], sequence: SequenceGroup) -> States:
    """The last process's states, on every process and without gradient."""
    source = sequence.size - 1
    described = [_describe(states)]
    dist.broadcast_object_list(described, group=sequence.group, group_src=source)
    tensors = _tensors(states) if sequence.is_last else _empty(described[0], states)
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor, group=sequence.group, group_src=source)
    return _restore(described[0], tensors, states)


def _describe(states: Mapping[str, MemoryState]) -> Shapes:
    return [
        (name, field, tuple(tensor.shape), tensor.dtype)
        for name, state in states.items()
        for field, tensor in state.tensors().items()
    ]


def _tensors(states: Mapping[str, MemoryState]) -> list[Tensor]:
    return [
        tensor.detach().contiguous()
        for state in states.values()
        for tensor in state.tensors().values()
    ]


def _empty(described: Shapes, states: Mapping[str, MemoryState]) -> list[Tensor]:
    """Room for what another process sends, on the devices of the own states."""
    devices = {name: next(iter(s.tensors().values())).device for name, s in states.items()}
    return [
        torch.empty(shape, dtype=dtype, device=devices[name]) for name, _, shape, dtype in described
    ]


def _restore(
    described: Shapes, tensors: list[Tensor] | tuple[Tensor, ...], states: Mapping[str, MemoryState]
) -> States:
    """States of the types of the own ones, made of these tensors."""
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in states}
    for (name, field, _, _), tensor in zip(described, tensors, strict=True):
        fields[name][field] = tensor
    return {name: type(state).from_state_dict(fields[name]) for name, state in states.items()}
