"""Passes states of layers between the processes that hold the rows of a call together.

Process r receives the state after the columns of process r - 1, and hands its own on to process
r + 1. Gradients of the states go the other way.
"""

from collections.abc import Mapping
from typing import Any

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
    found: dict[str, dict[str, Tensor]] = {}
    for (name, field, _, _), tensor in zip(described, tensors, strict=True):
        found.setdefault(name, {})[field] = tensor
    return {name: type(states[name]).from_state_dict(fields) for name, fields in found.items()}


def receive_states(
    states: Mapping[str, MemoryState], sequence: SequenceGroup
) -> tuple[States, Tensor]:
    """The states after the columns of the process before; waits for its `hand_on`.

    Args:
        states: at the start of the whole rows, which the first process goes on from.
        sequence: the processes.

    Returns:
        The states, with gradient, and a scalar that `hand_on` has to be given: it makes sure that
        gradients are sent back also where nothing depends on the states.
    """
    device = next(tensor.device for s in states.values() for tensor in s.tensors().values())
    token = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    if not sequence.rank:
        return dict(states), token
    described: list[Shapes | None] = [None]
    before = sequence.rank - 1
    dist.recv_object_list(described, group=sequence.group, group_src=before)
    token, *tensors = _Receive.apply(token, sequence, _empty(described[0], states))
    return _restore(described[0], tensors, states), token


def hand_on(
    output: Tensor, states: Mapping[str, MemoryState], token: Tensor, sequence: SequenceGroup
) -> Tensor:
    """Send states to the next process, which waits in `receive_states`; returns `output`.

    The backward pass of what is returned waits for the gradients of the states, so it has to be
    part of the graph of every process's loss.

    Args:
        output: what the loss is made of.
        states: after the columns of this process.
        token: from `receive_states`.
        sequence: the processes.
    """
    if not sequence.is_last:
        described = [_describe(states)]
        dist.send_object_list(described, group=sequence.group, group_dst=sequence.rank + 1)
    tensors = [tensor for state in states.values() for tensor in state.tensors().values()]
    return _HandOn.apply(output, sequence, token, *tensors)


class _Receive(torch.autograd.Function):
    """Tensors of the process before, into `room`. Backward their gradients are sent there."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, sequence: SequenceGroup, room: list[Tensor]
    ) -> tuple[Tensor, ...]:
        ctx.sequence = sequence
        for tensor in filter(Tensor.numel, room):
            dist.recv(tensor, group=sequence.group, group_src=sequence.rank - 1)
        ctx.mark_non_differentiable(*[tensor for tensor in room if not _travels_back(tensor)])
        return token.clone(), *room

    @staticmethod
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[None, None, None]:
        sequence = ctx.sequence
        for gradient in filter(_travels_back, gradients):
            dist.send(gradient.contiguous(), group=sequence.group, group_dst=sequence.rank - 1)
        return None, None, None


class _HandOn(torch.autograd.Function):
    """Sends tensors to the next process. Backward their gradients come from there."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, sequence: SequenceGroup, token: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.sequence = sequence
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if not sequence.is_last:
            for tensor in filter(Tensor.numel, tensors):
                dist.send(tensor.contiguous(), group=sequence.group, group_dst=sequence.rank + 1)
        # Reading it back runs a checkpointed block again, which has to come before the wait: the
        # next process runs its block again too, and needs this one's states for that.
        ctx.save_for_backward(token)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        sequence, gradients = ctx.sequence, [None] * len(ctx.like)
        if not sequence.is_last:
            for index, (shape, dtype, device) in enumerate(ctx.like):
                room = torch.empty(shape, dtype=dtype, device=device)
                if _travels_back(room):
                    dist.recv(room, group=sequence.group, group_src=sequence.rank + 1)
                    gradients[index] = room
        return gradient, None, torch.zeros_like(token), *gradients


def _travels_back(tensor: Tensor) -> bool:
    """Whether a gradient of it is sent back."""
    return tensor.is_floating_point() and tensor.numel() > 0
