"""What the tests of memory replay are written with."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from memlm.layers.state import MemoryState
from memlm.training.loss import RowLoss
from memlm.training.replay import ReplayedRows, RowPasses, WholeRows
from tests.memory.law_tools import VOCABULARY

LENGTH, SEGMENT = 26, 7  # several segments of every store, and a last piece that is shorter
SCALE = torch.tensor([0.02, 0.05])


def make_batch(
    rows: int = 2, length: int = LENGTH, packed: bool = False, first: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Rows of tokens in two loss groups.

    Args:
        rows: of the batch; packed ones are two.
        length: tokens per row.
        packed: documents of unequal lengths and padding, else one document.
        first: position of the first token in its document.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, length + 1), generator=generator)
    segment_ids = torch.ones(rows, length, dtype=torch.int64)
    positions = torch.arange(first, first + length).repeat(rows, 1)
    if packed:
        # A border where a replayed segment begins, others within, and padding at the end.
        for row, borders in enumerate(([SEGMENT, 12, length - 3], [3, 2 * SEGMENT + 2, length])):
            for number, start in enumerate(borders[:2]):
                segment_ids[row, start:] = number + 2
                positions[row, start:] = torch.arange(length - start)
            segment_ids[row, borders[2] :] = 0
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "segment_ids": segment_ids,
        "position_ids": positions,
        "labels": tokens[:, 1:].masked_fill(segment_ids == 0, -100),
        "loss_groups": torch.randint(0, 2, (rows, length), generator=generator),
    }


def passes_of(
    model: nn.Module, segment: int | None = None, accelerator: Accelerator | None = None
) -> RowPasses:
    """Whole rows, or rows replayed by segments."""
    accelerator = accelerator or Accelerator(cpu=True)
    row_loss = accelerator.prepare_model(RowLoss(model))
    if segment is None:
        return WholeRows(accelerator, row_loss, True)
    return ReplayedRows(accelerator, row_loss, True, segment)


class Chained:
    """One graph through all segments: what replay has to give, in the memory of whole rows."""

    def __init__(self, model: nn.Module, segment: int, accelerator: Accelerator | None = None):
        accelerator = accelerator or Accelerator(cpu=True)
        self.row_loss, self.segment = accelerator.prepare_model(RowLoss(model)), segment
        self._loss: Tensor | None = None

    def forward(self, batch, states, scale):
        loss, losses = 0, 0
        detach, MemoryState.detach = MemoryState.detach, lambda state: state
        try:
            for start in range(0, batch["labels"].shape[1], self.segment):
                part = {key: rows[:, start : start + self.segment] for key, rows in batch.items()}
                part_loss, sums, states = self.row_loss(part, states, scale, True)
                loss, losses = loss + part_loss, losses + sums
        finally:
            MemoryState.detach = detach
        self._loss = loss
        return losses, {name: state.detach() for name, state in states.items()}

    def backward(self):
        self._loss.backward()


Run = tuple[Tensor, dict[str, MemoryState], dict[str, Tensor]]


def run(model: nn.Module, passes, batch: dict[str, Tensor], states=None) -> Run:
    """Losses, new states, and the gradient of every parameter that has one."""
    model.zero_grad()
    losses, states = passes.forward(batch, states, SCALE)
    passes.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, states, {name: gradient.clone() for name, gradient in gradients.items()}


def gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference as a fraction of the norm, over all parameters."""
    assert actual.keys() == expected.keys()

    def norm(gradients) -> float:
        return float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5

    return norm(actual[name] - expected[name] for name in expected) / norm(expected.values())


def assert_same_run(actual: Run, expected: Run, tolerance: float) -> None:
    """Raise AssertionError unless losses and gradients agree, and the states have no graph."""
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    assert gradient_error(actual[2], expected[2]) < tolerance
    assert not any(
        tensor.requires_grad for state in actual[1].values() for tensor in state.tensors().values()
    )
