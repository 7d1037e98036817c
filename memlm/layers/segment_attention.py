"""Attention inside the segments of a document, over persistent tokens, companions and the segment.

A companion is a vector that goes with every token of the segment, such as what a memory says of it
(Behrouz et al., arXiv 2501.00663, section 4.1). Token i sees the persistent tokens and, of its
segment, the tokens and companions up to its own: the paper's full attention over
[persistent; companions; segment] would show it the tokens behind it as well.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.attention_state import AttentionState
from memlm.layers.persistent_attention import PersistentAttention


class SegmentAttention(PersistentAttention):
    """Segments of `spec.window` positions, counted from the document's start, as tiles.

    A tile is one segment of one document: slot s holds its s-th position. The state holds the last
    tile's keys and values, the slots of the document's next tokens still empty or outdated.
    """

    def __init__(
        self,
        spec: AttentionConfig,
        hidden_size: int,
        persistent_tokens: int,
        norm_eps: float = 1e-6,
    ):
        if spec.output_gate:
            raise UserError("output_gate: attention in segments has none")
        super().__init__(spec, hidden_size, persistent_tokens, norm_eps)
        self.segment = spec.window

    def init_state(self, batch_size: int, device=None, dtype=None) -> AttentionState:
        """A tile of empty slots."""
        state = super().init_state(batch_size, device, dtype)
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, self.segment)) for x in (state.keys, state.values))
        positions = F.pad(state.positions, (0, self.segment), value=-1)
        return AttentionState(keys, values, positions, state.tail)

    def project(self, hidden: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, heads, channels] of tokens [T, hidden_size] at slots [T]."""
        angles = None
        if self.rotary is not None:
            angles = self.rotary.angles(slots[None], hidden.dtype)
        query, key, value = self._project(hidden[None], angles)
        return query[0], key[0], value[0]

    def attend(
        self, query: Tensor, positions: Tensor, *seen: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Attend in tiles.

        Args:
            query: [M, segment, H, channels], as `project` makes them.
            positions: int64 [M, segment], within the document, -1 in slots without a query.
            seen: keys, values [M, segment, Hkv, D] and their positions int64 [M, segment], of
                tokens or companions.

        Returns:
            [M, segment, hidden_size]; without meaning in slots that have no query.
        """
        keys, values, key_positions = (torch.cat(part, 1) for part in zip(*seen, strict=True))
        distance = positions[:, :, None] - key_positions[:, None, :]
        slot = torch.arange(self.segment, device=query.device)[:, None]
        visible = (key_positions >= 0)[:, None] & (distance >= 0)
        visible &= (distance <= slot) & (distance < self.window)
        # A slot without a query would see nothing, and softmax of nothing is NaN.
        visible |= (positions < 0)[:, :, None]
        output = self._attend(query, keys, values, visible[:, None])
        return self.o_proj(output.flatten(-2))
