"""Back-propagation through whole rows in the memory of one segment: memory replay.

After Wu et al. 2020, "Memformer", arXiv 2010.06891, Algorithm 1 (MRBP).
"""

import contextlib
import dataclasses
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.training.loss import Batch, RowLoss, StateGradients, States
from memlm.training.zero2 import is_engine

_POSSIBLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class RowPasses(Protocol):
    """The forward and the backward pass of the rows of one micro-batch."""

    def forward(
        self, batch: Batch, states: States | None, scale: Tensor
    ) -> tuple[Tensor, States | None]:
        """Summed losses, float32 [groups], detached, and the new states where they are carried.

        Args:
            batch: as `RowLoss` takes it.
            states: what the rows continue from; no gradient goes there.
            scale: weight of each group in the loss, float32 [groups].
        """

    def backward(self) -> None:
        """Add the gradients of the loss of the last forward pass."""


def row_passes(options: TrainConfig, accelerator: Accelerator, row_loss: nn.Module) -> RowPasses:
    """The passes that `train.backprop` asks for.

    Args:
        options: of the run.
        accelerator: its processes.
        row_loss: a `RowLoss`, as the accelerator has wrapped it.

    Raises:
        UserError: for replay under anything but DDP and FSDP2.
    """
    if options.backprop == "truncated":
        return WholeRows(accelerator, row_loss, options.carry_state)
    if accelerator.distributed_type not in _POSSIBLE and not accelerator.is_fsdp2:
        raise UserError(
            f"train.backprop: replay does not work under {accelerator.distributed_type.value}; "
            "launch with DDP or FSDP2, or use truncated"
        )
    return ReplayedRows(accelerator, row_loss, options.carry_state, options.replay_segment)


class WholeRows:
    """Rows that are run once; everything between is kept until the backward pass."""

    def __init__(self, accelerator: Accelerator, row_loss: nn.Module, carry: bool):
        self.accelerator, self.row_loss, self.carry = accelerator, row_loss, carry
        self._loss: Tensor | None = None

    def forward(
        self, batch: Batch, states: States | None, scale: Tensor
    ) -> tuple[Tensor, States | None]:
        """See `RowPasses`."""
        self._loss, sums, states = self.row_loss(batch, states, scale, self.carry)
        return sums, states

    def backward(self) -> None:
        """See `RowPasses`."""
        loss, self._loss = self._loss, None
        if is_engine(self.row_loss):
            self.row_loss.backward(loss)
        else:
            self.accelerator.backward(loss)


class ReplayedRows:
    """Rows that are cut into segments, of which one at a time has a graph.

    The forward pass runs the segments one after the other and keeps the memory states at their
    borders. The backward pass goes from the last segment to the first: each is run again from its
    kept states, and the gradient of its losses is joined by that of the states it handed on, which
    the replay of the later segment found. Gradients are those of one graph through all segments;
    that is one through the whole row wherever a model computes the same for a row and its pieces.

    The last segment keeps its graph from the forward pass, so n segments take 2 n - 1 forward
    passes. The others run with gradients on as well, though nothing of their graphs is kept: a
    memory may compute otherwise without, and it may then change states in place. The second run of
    a segment draws the same random numbers, and finds the buffers (running statistics) as they
    were; what it does to them is undone.

    Under DDP and FSDP2 gradients are reduced once, in the backward pass of the first segment.

    Args:
        accelerator: of the run.
        row_loss: a `RowLoss`, as the accelerator has wrapped it.
        carry: whether `forward` returns the new states.
        segment: tokens per segment; the last one of a row may be shorter.
    """

    def __init__(self, accelerator: Accelerator, row_loss: nn.Module, carry: bool, segment: int):
        self.accelerator, self.row_loss = accelerator, row_loss
        self.plain_loss: RowLoss = accelerator.unwrap_model(row_loss)
        self.carry, self.segment = carry, segment
        self._kept: list[_Segment] = []
        self._last: tuple[Tensor, Tensor, States] | None = None

    def forward(
        self, batch: Batch, states: States | None, scale: Tensor
    ) -> tuple[Tensor, States | None]:
        """See `RowPasses`."""
        length = batch["labels"].shape[1]
        parts = [
            {name: rows[:, start : start + self.segment] for name, rows in batch.items()}
            for start in range(0, length, self.segment)
        ]
        self._kept, losses = [], []
        for part in parts[:-1]:
            self._kept.append(_Segment(part, states, self._surroundings()))
            sums, states = self._without_graph(part, states)
            losses.append(sums)
        first = states if len(parts) == 1 else _leaves(states)
        with self._apart(len(parts) > 1):
            loss, sums, states = self.row_loss(parts[-1], first, scale, self.carry)
        self._last = (loss, scale, first if len(parts) > 1 else {})
        return torch.stack([*losses, sums]).sum(0), states

    def backward(self) -> None:
        """See `RowPasses`."""
        (loss, scale, leaves), self._last = self._last, None
        end = self._surroundings()
        with self._apart(bool(self._kept)):
            self._backward(loss)
        del loss
        while self._kept:
            gradients = _gradients(leaves)
            segment = self._kept.pop()
            self._restore(segment.surroundings)
            leaves = _leaves(segment.states) if self._kept else {}
            with self._apart(bool(self._kept)):
                loss, *_ = self.row_loss(
                    segment.part, leaves or segment.states, scale, True, state_gradients=gradients
                )
                self._backward(loss)
            del loss
        self._restore(end)

    def _without_graph(self, part: Batch, states: States | None) -> tuple[Tensor, States]:
        # The graph must die here, before the next segment makes its own.
        _, sums, states = self.plain_loss(part, states, carry=True)
        return sums, states

    def _backward(self, loss: Tensor) -> None:
        # Where only a memory is trained, a segment of nothing but padding has no graph.
        if loss.requires_grad:
            self.accelerator.backward(loss)

    def _apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Where gradients stay on their process."""
        return self.accelerator.no_sync(self.row_loss) if apart else contextlib.nullcontext()

    def _surroundings(self) -> "_Surroundings":
        device = self.accelerator.device
        return _Surroundings(
            torch.get_rng_state(),
            None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
            [buffer.clone() for buffer in self._buffers()],
        )

    def _restore(self, then: "_Surroundings") -> None:
        device = self.accelerator.device
        torch.set_rng_state(then.random)
        if then.device_random is not None:
            torch.get_device_module(device).set_rng_state(then.device_random, device)
        for buffer, value in zip(self._buffers(), then.buffers, strict=True):
            buffer.copy_(value)

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in self.plain_loss.buffers() if buffer.is_floating_point()]


@dataclasses.dataclass
class _Surroundings:
    """What a forward pass uses and changes besides states.

    Attributes:
        random: state of the CPU's random numbers.
        device_random: of the device's; None on a CPU.
        buffers: the floating ones of the model.
    """

    random: Tensor
    device_random: Tensor | None
    buffers: list[Tensor]


@dataclasses.dataclass
class _Segment:
    """A segment that will be run again: its tokens, and what it starts from."""

    part: Batch
    states: States | None
    surroundings: _Surroundings


def _leaves(states: States) -> States:
    """The states, of which every floating tensor collects a gradient."""
    leaves = {}
    for name, state in states.items():
        tensors = {
            field: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
            for field, tensor in state.tensors().items()
        }
        leaves[name] = type(state).from_state_dict(tensors)
    return leaves


def _gradients(leaves: States) -> StateGradients:
    """What the leaves collected, by state and field."""
    return {
        (name, field): tensor.grad
        for name, state in leaves.items()
        for field, tensor in state.tensors().items()
        if tensor.grad is not None
    }
