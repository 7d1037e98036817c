"""What every stateful layer is told about the tokens of one call.

A batch row holds padding and pieces of documents. A *piece* is the run of tokens that one document
has in one row of one call: the first piece of a row may continue the document that the carried
state belongs to, every later piece starts a document. Layers work on packed pieces, so padding and
document borders cannot leak by construction.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from memlm.layers.rotary import Rotary
from memlm.layers.sequence_group import SequenceGroup
from memlm.layers.state import MemoryState

State = TypeVar("State", bound=MemoryState)


@dataclasses.dataclass
class SequenceLayout:
    """The pieces of one call.

    When `uniform` (no padding, no document border inside a row) packing is the identity: N = B
    pieces of length T. Otherwise the valid tokens of all rows are laid end to end.

    Attributes:
        valid: bool [B, T], False for padding.
        document: int64 [B, T]; 0 = the carried document, 1.. = later documents of the row,
            -1 = padding.
        uniform: whether packing is the identity.
        all_continue: whether every piece continues the carried state of its row.
        continues: bool [N], whether the piece continues the carried state of its row.
        first_position: int64 [N], position within its document of the piece's first token.
        piece_row: int64 [N], the row of each piece.
        last_piece: int64 [B], the last piece of each row, -1 where a row has no valid token.
        token_index: int64 [total], flat index into B*T of each packed token (None if uniform).
        cu_seqlens: int64 [N + 1], where each piece starts in the packed order (None if uniform).
        may_jump: whether the carried document may go on at another position than the next one.
    """

    valid: Tensor
    document: Tensor
    uniform: bool
    all_continue: bool
    continues: Tensor
    first_position: Tensor
    piece_row: Tensor
    last_piece: Tensor
    token_index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    may_jump: bool = False

    @classmethod
    def build(cls, position_ids: Tensor, valid: Tensor, starts: Tensor) -> "SequenceLayout":
        """Find the pieces of a call.

        Args:
            position_ids: int64 [B, T], position of each token within its document.
            valid: bool [B, T], False for padding.
            starts: bool [B, T], True where a document begins.
        """
        batch_size, length = valid.shape
        device = valid.device
        starts = starts & valid
        document = torch.where(valid, starts.cumsum(1), -1)
        rows = torch.arange(batch_size, device=device)
        if length == 0:
            continues = torch.ones(batch_size, dtype=torch.bool, device=device)
            zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
            return cls(valid, document, True, True, continues, zeros, rows, rows)
        if bool(valid.all()) and not bool(starts[:, 1:].any()):
            continues = ~starts[:, 0]
            every = bool(continues.all())
            return cls(valid, document, True, every, continues, position_ids[:, 0], rows, rows)

        token_index = valid.flatten().nonzero().squeeze(1)
        token_row = token_index // length
        begins = starts.flatten()[token_index]
        begins = begins | (token_row != torch.nn.functional.pad(token_row, (1, 0), value=-1)[:-1])
        first = begins.nonzero().squeeze(1)
        piece_row = token_row[first]
        count = piece_row.shape[0]
        last_piece = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        last_piece.scatter_reduce_(0, piece_row, torch.arange(count, device=device), "amax")
        end = torch.tensor([token_index.shape[0]], device=device)
        continues = document.flatten()[token_index[first]] == 0
        return cls(
            valid,
            document,
            False,
            bool(continues.all()),
            continues,
            position_ids.flatten()[token_index[first]],
            piece_row,
            last_piece,
            token_index,
            torch.cat([first, end]),
        )

    @classmethod
    def step(cls, position_ids: Tensor) -> "SequenceLayout":
        """That of one token per row, int64 [B, 1], each of which continues its row's document."""
        valid, document, rows = _step_tensors(len(position_ids), position_ids.device)
        return cls(
            valid, document, True, True, valid.squeeze(1), position_ids.squeeze(1), rows, rows
        )

    @property
    def is_step(self) -> bool:
        """Whether the call has one token per row, each of which continues its row's document."""
        return self.uniform and self.all_continue and self.valid.shape[1] == 1

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

    @property
    def num_pieces(self) -> int:
        return self.piece_row.shape[0]

    @property
    def num_tokens(self) -> int:
        """The tokens that are not padding."""
        return self.valid.numel() if self.uniform else self.token_index.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [N], the tokens of each piece."""
        if self.uniform:
            return torch.full_like(self.piece_row, self.valid.shape[1])
        return self.cu_seqlens.diff()

    def pack(self, rows: Tensor) -> Tensor:
        """[B, T, ...] -> [B, T, ...] if uniform, else the valid tokens [1, total, ...]."""
        if self.uniform:
            return rows
        return rows.flatten(0, 1).index_select(0, self.token_index).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, zero at padding."""
        if self.uniform:
            return packed
        batch_size, length = self.valid.shape
        rows = packed.new_zeros(batch_size * length, *packed.shape[2:])
        rows = rows.index_copy(0, self.token_index, packed.squeeze(0))
        return rows.unflatten(0, (batch_size, length))

    def incoming(self, state: State) -> State:
        """The carried state of B rows as the initial state of N pieces."""
        if not self.uniform:
            state = state.select(self.piece_row)
        return state if self.all_continue else state.reset(~self.continues)

    def outgoing(self, final: State, carried: State) -> State:
        """The final states of N pieces as the new carried state of B rows."""
        if self.uniform:
            return final
        if self.num_pieces == 0:
            return carried
        state = final.select(self.last_piece.clamp(min=0))
        return state.where(self.last_piece >= 0, carried)


@functools.lru_cache(maxsize=64)
def _step_tensors(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`valid`, `document` and `piece_row` of one token per row."""
    # Kept for later calls, so made as ordinary tensors wherever the first one stands.
    with torch.inference_mode(False):
        return (
            torch.ones(batch_size, 1, dtype=torch.bool, device=device),
            torch.zeros(batch_size, 1, dtype=torch.int64, device=device),
            torch.arange(batch_size, device=device),
        )


@dataclasses.dataclass
class CallContext:
    """Everything about one call besides the hidden states and the layer's own state.

    Attributes:
        layout: the pieces of documents in this call.
        position_ids: int64 [B, T], position within the document.
        write: False = tokens read the given states and nothing is written.
        shared: objects shared by the layers of this call, by name: modules owned by the model
            (value tables) and results of this call (retrievals).
        input_ids: int64 [B, T], or None when embeddings were given.
        sequence: the processes that hold the rows together; then everything else here is about
            this process's columns. None = it has whole rows.
        before: of the columns before them, which other processes have; None where there are none.
        dense: whether the whole rows that they are part of have no padding.
    """

    layout: SequenceLayout
    position_ids: Tensor
    write: bool = True
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    input_ids: Tensor | None = None
    sequence: SequenceGroup | None = None
    before: "CallContext | None" = None
    dense: bool = False

    def rotary_angles(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the tokens' rotary angles, [B, T, channels], made once in a call."""
        angles = self.shared.get((rotary, dtype))
        if angles is None:
            angles = self.shared[rotary, dtype] = rotary.angles(self.position_ids, dtype)
        return angles

    @classmethod
    def plain(
        cls, batch_size: int, length: int, first_position: int = 0, **kwargs
    ) -> "CallContext":
        """A call of unpadded rows of one document each, from `first_position` on."""
        positions = torch.arange(first_position, first_position + length).expand(batch_size, -1)
        valid = torch.ones(batch_size, length, dtype=torch.bool)
        return cls(SequenceLayout.build(positions, valid, positions == 0), positions, **kwargs)
