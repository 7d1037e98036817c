"""The states of a model inside a transformers Cache, so that generate() carries them.

One cache layer holds one named state (an attention's keys and values, a memory, the positions),
and every rearrangement that generation asks for is passed to it.
"""

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from memlm.errors import UserError
from memlm.layers.state import MemoryState


class StateLayer(CacheLayerMixin):
    """A cache layer around one MemoryState."""

    supports_early_init = False

    def __init__(self, state: MemoryState | None = None):
        super().__init__()
        self.state = state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("the model itself fills this cache; it takes no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise TypeError("the model itself fills this cache; it takes no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state.select(indices)

    def crop(self, max_length: int) -> None:
        raise UserError(
            "a memory cannot take tokens back, as assisted decoding asks for; generate without "
            "assisted decoding"
        )

    def offload(self) -> None:
        raise ValueError("the states of this model cannot be offloaded")


class MemLMCache(Cache):
    """All states of a batch, by name, and how many columns of input have been read."""

    def __init__(self, states: dict[str, MemoryState] | None = None):
        self.names = list(states or {})
        self.columns = 0
        super().__init__(layers=[StateLayer(state) for state in (states or {}).values()])

    @property
    def states(self) -> dict[str, MemoryState] | None:
        """The states by name; None before the first call."""
        if not self.names:
            return None
        return {name: layer.state for name, layer in zip(self.names, self.layers, strict=True)}

    def store(self, states: dict[str, MemoryState], columns: int) -> None:
        """Put the states that a call of `columns` tokens returned in place of the old ones."""
        if not self.names:
            self.names = list(states)
            self.layers = [StateLayer(state) for state in states.values()]
        else:
            for name, layer in zip(self.names, self.layers, strict=True):
                layer.state = states[name]
        self.columns += columns

    def continued_positions(self, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Positions for generate(), which itself counts them from the first column it is given.

        The states may have read tokens that are not among its columns, or have been reset: the
        next token of a row gets the position that follows in its document.

        Args:
            position_ids: int64 [B or 1, columns], as generate() counts.
            attention_mask: [B, columns]; None = no padding.
        """
        states = self.states
        if states is None:
            return position_ids
        following = states["position"].next_position
        read = self.columns
        if attention_mask is not None:
            read = attention_mask[:, : self.columns].sum(1).to(following.device)
        return position_ids + (following - read)[:, None].to(position_ids.device)

    @property
    def nbytes(self) -> int:
        """Bytes held by all states."""
        return sum(layer.state.nbytes for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input read so far, padding included: generate() slices its input by it."""
        return self.columns

    def reset(self) -> None:
        super().reset()
        self.columns = 0
