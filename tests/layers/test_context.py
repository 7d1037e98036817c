"""Pieces of documents in rows with padding."""

import dataclasses

import torch
from torch import Tensor

from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class Count(MemoryState):
    count: Tensor

    def reset(self, rows=None):
        return Count(self.count * 0 if rows is None else self.count.masked_fill(rows, 0))


def layout(valid, starts):
    valid, starts = (torch.tensor(x, dtype=torch.bool) for x in (valid, starts))
    positions = torch.arange(valid.shape[1]).expand(valid.shape)
    return SequenceLayout.build(positions, valid, starts)


def test_plain_rows_are_uniform():
    found = layout([[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]])
    assert found.uniform and found.num_pieces == found.batch_size == 2 and found.num_tokens == 6
    assert found.continues.tolist() == [False, True]
    x = torch.randn(2, 3, 4)
    assert found.pack(x) is x and found.unpack(x) is x
    incoming = found.incoming(Count(torch.tensor([7, 8])))
    assert incoming.count.tolist() == [0, 8]
    assert found.outgoing(incoming, Count(torch.tensor([7, 8]))) is incoming


def test_pieces_of_padded_and_packed_rows():
    found = layout(
        [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]],
    )
    assert not found.uniform and found.num_tokens == 7
    assert found.document.tolist() == [[-1, 0, 0, -1, 1], [-1] * 5, [1, 1, 2, 2, -1]]
    assert found.piece_row.tolist() == [0, 0, 2, 2]
    assert found.continues.tolist() == [True, False, False, False]
    assert found.first_position.tolist() == [1, 4, 0, 2]
    assert found.last_piece.tolist() == [1, -1, 3]
    assert found.cu_seqlens.tolist() == [0, 2, 3, 5, 7]
    assert found.token_index.tolist() == [1, 2, 4, 10, 11, 12, 13]


def test_pack_and_unpack_are_inverse_on_tokens():
    found = layout([[0, 1, 1], [1, 1, 0]], [[0, 0, 0], [0, 1, 0]])
    x = torch.randn(2, 3, 2)
    packed = found.pack(x)
    assert packed.shape == (1, 4, 2)
    assert torch.equal(found.unpack(packed), x * found.valid[..., None])


def test_states_of_rows_become_states_of_pieces_and_back():
    found = layout([[1, 1], [0, 0], [1, 1]], [[0, 1], [0, 0], [0, 0]])
    carried = Count(torch.tensor([5, 6, 7]))
    incoming = found.incoming(carried)
    assert incoming.count.tolist() == [5, 0, 7]
    final = Count(torch.tensor([10, 11, 12]))
    assert found.outgoing(final, carried).count.tolist() == [11, 6, 12]


def test_calls_without_tokens():
    nothing = layout([[0, 0], [0, 0]], [[1, 0], [0, 0]])
    carried = Count(torch.tensor([5, 6]))
    assert nothing.num_pieces == nothing.num_tokens == 0
    assert nothing.outgoing(nothing.incoming(carried), carried) is carried
    flags = torch.zeros(2, 0, dtype=torch.bool)
    empty = SequenceLayout.build(flags.long(), flags, flags)
    assert empty.uniform and empty.num_tokens == 0
    assert empty.outgoing(empty.incoming(carried), carried).count.tolist() == [5, 6]


def test_plain_context_starts_a_document_only_at_position_zero():
    assert not CallContext.plain(2, 3).layout.continues.any()
    later = CallContext.plain(2, 3, first_position=4, write=False)
    assert later.layout.continues.all() and not later.write
    assert later.position_ids[1].tolist() == [4, 5, 6]
