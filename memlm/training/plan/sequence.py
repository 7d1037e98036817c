"""What the processes that hold rows together send each other, counted on one that runs alone."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from memlm.layers.sequence_group import SequenceGroup
from memlm.layers.state import MemoryState
from memlm.models import block, modeling

States = dict[str, MemoryState]


class CountedGroup(SequenceGroup):
    """The last process of a group whose others are not there: what it would send is counted.

    The last one has the most keys to attend to. What passes between neighbours is counted as on a
    process that has two of them. A few bytes that describe states are left out.

    Args:
        size: processes of the group.

    Attributes:
        block: the number of the block that runs.
        nbytes: by operation and number of the block, as `Traffic.payload`.
    """

    rank = property(lambda self: self.size - 1)
    size = property(lambda self: self._size)

    def __init__(self, size: int):
        super().__init__(None)
        self._size, self.block = size, 0
        self.nbytes: Counter[tuple[str, int]] = Counter()

    def all(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return _Gathered.apply(tensor, self)

    def from_previous(self, tensor: Tensor) -> Tensor:
        return _Passed.apply(tensor, self)

    def count(self, operation: str, nbytes: int, number: int) -> None:
        """Add what travels for the block of this number."""
        self.nbytes[operation, number] += nbytes

    def receive_states(self, states: States, _: SequenceGroup) -> tuple[States, Tensor]:
        """As `memlm.layers.state_passing.receive_states`; `hand_on` counts."""
        names = [(name, field) for name, state in states.items() for field in state.tensors()]
        tensors = [states[name].tensors()[field] for name, field in names]
        like = next(iter(tensors))
        token = torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())
        token, *tensors = _Received.apply(token, *tensors)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in states}
        for (name, field), tensor in zip(names, tensors, strict=True):
            found[name][field] = tensor
        kinds = {name: type(state) for name, state in states.items()}
        return {name: kinds[name].from_state_dict(found[name]) for name in states}, token

    def hand_on(self, output: Tensor, states: States, token: Tensor, _: SequenceGroup) -> Tensor:
        """As `memlm.layers.state_passing.hand_on`."""
        tensors = [tensor for state in states.values() for tensor in state.tensors().values()]
        return _HandedOn.apply(output, self, token, *tensors)

    def share_states(self, states: Mapping[str, MemoryState], _: SequenceGroup) -> States:
        """As `memlm.layers.state_passing.share_states`: the last process has them already."""
        for name, state in states.items():
            number = name.partition(".")[0]
            if number.isdigit():  # those of the model itself are a few numbers per row
                self.count("exchange", state.nbytes, int(number))
        return dict(states)


@contextlib.contextmanager
def counted(model: modeling.MemLMForCausalLM, size: int) -> Iterator[CountedGroup]:
    """The model runs as the last of `size` processes that hold its rows together.

    Raises:
        UserError: for a model that needs whole rows.
    """
    group = CountedGroup(size)
    if size == 1:
        yield group
        return
    model.set_sequence_group(group)
    passing = {"receive_states": block, "hand_on": block, "share_states": modeling}
    before = {name: getattr(module, name) for name, module in passing.items()}
    # Of its branches, since a block that runs again is not called as a module the second time.
    handles = [
        branch.register_forward_pre_hook(lambda *_, number=number: setattr(group, "block", number))
        for number, layer in enumerate(model.model.layers)
        for branch in layer.branches().values()
    ]
    for name, module in passing.items():
        setattr(module, name, getattr(group, name))
    try:
        yield group
    finally:
        for name, module in passing.items():
            setattr(module, name, before[name])
        for handle in handles:
            handle.remove()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CountedGroup) -> tuple[Tensor, ...]:
        ctx.group, ctx.number, ctx.nbytes = group, group.block, group.size * tensor.nbytes
        group.count("all-gather", ctx.nbytes, ctx.number)
        return tuple(torch.empty_like(tensor) for _ in range(group.size))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.group.count("reduce-scatter", ctx.nbytes, ctx.number)
        parts = [part.contiguous() for part in gradients]
        return torch.empty_like(parts[0]), None


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: CountedGroup) -> Tensor:
        ctx.group, ctx.number = group, group.block
        group.count("exchange", tensor.nbytes, ctx.number)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.group.count("exchange", gradient.nbytes, ctx.number)
        return torch.empty_like(gradient, memory_format=torch.contiguous_format), None


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        room = [torch.empty_like(tensor) for tensor in tensors]
        ctx.mark_non_differentiable(*[one for one in room if not one.is_floating_point()])
        return token.clone(), *room

    @staticmethod
    def backward(ctx: Any, token: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[None] * len(gradients)


class _HandedOn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, group: CountedGroup, token: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.group, ctx.number, ctx.tensors = group, group.block, len(tensors)
        ctx.back = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        group.count("exchange", sum(tensor.nbytes for tensor in tensors), ctx.number)
        ctx.save_for_backward(token)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        ctx.group.count("exchange", ctx.back, ctx.number)
        return gradient, None, torch.zeros_like(token), *[None] * ctx.tensors
