"""Operations on states return new states and leave the old ones as they were."""

import dataclasses

import pytest
import torch
from torch import Tensor

from memlm.layers.state import MemoryState


@dataclasses.dataclass
class Pair(MemoryState):
    numbers: Tensor
    layers: tuple[Tensor, ...]

    def reset(self, rows=None):
        rows = torch.ones(self.batch_size, dtype=torch.bool) if rows is None else rows
        return self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))


@pytest.fixture
def state():
    return Pair(torch.arange(1, 4), (torch.ones(3, 2) * 5, torch.arange(1.0, 7).view(3, 2)))


def test_rearranging_rows(state):
    assert state.select(torch.tensor([2, 2, 0])).numbers.tolist() == [3, 3, 1]
    assert state.reorder(torch.tensor([1, 0, 2])).layers[1][0].tolist() == [3, 4]
    assert state.repeat(2).numbers.tolist() == [1, 1, 2, 2, 3, 3]
    assert state.repeat(2).layers[1].shape == (6, 2)
    assert state.numbers.tolist() == [1, 2, 3]


def test_where_takes_rows_of_either_state(state):
    rows = torch.tensor([True, False, True])
    merged = state.where(rows, state.reset())
    assert merged.numbers.tolist() == [1, 0, 3]
    assert merged.layers[1].tolist() == [[1, 2], [0, 0], [5, 6]]


def test_copies_share_nothing(state):
    copy = state.clone()
    copy.numbers += 1
    copy.layers[0].zero_()
    assert state.numbers.tolist() == [1, 2, 3] and state.layers[0].sum() == 30
    tracked = Pair(state.numbers, tuple(x.clone().requires_grad_() for x in state.layers))
    assert not any(x.requires_grad for x in tracked.detach().layers)
    assert state.to("meta").layers[1].device.type == "meta"


def test_names_sizes_and_bytes(state):
    assert list(state.tensors()) == ["numbers", "layers.0", "layers.1"]
    assert state.batch_size == 3
    assert state.nbytes == 3 * 8 + 2 * 6 * 4


def test_state_dict_round_trip(state):
    loaded = Pair.from_state_dict(state.state_dict())
    assert isinstance(loaded.layers, tuple)
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    transposed = Pair(state.numbers, (state.layers[0].T,))
    assert all(tensor.is_contiguous() for tensor in transposed.state_dict().values())
    with pytest.raises(KeyError, match="Pair: the saved state has no 'layers'"):
        Pair.from_state_dict({"numbers": state.numbers})
