"""The states of a model inside a transformers Cache, so that generate() carries them.

One cache layer holds one named state (an attention's keys and values, a memory, the positions),
and every rearrangement that generation asks for is passed to it.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from memlm.errors import UserError
from memlm.layers.state import MemoryState
from memlm.models.documents import check_rows

if TYPE_CHECKING:
    from memlm.models.generation import FinishedRows


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
    """All states of a batch, by name, and how many columns of input have been read.

    Attributes:
        names: of the states, in the order of the layers.
        columns: of input that were read, padding included. generate() takes so many columns of
            its input for read: 0 for a cache made of states, which new tokens continue.
        finished: the rows that a running generate() has ended; None outside of it.
    """

    def __init__(self, states: dict[str, MemoryState] | None = None):
        self.names = list(states or {})
        self.columns = 0
        self.finished: FinishedRows | None = None
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

    def repeated(self, copies: int) -> "MemLMCache":
        """A cache with every row `copies` times, side by side; this one stays as it is."""
        cache = MemLMCache({name: state.repeat(copies) for name, state in self.states.items()})
        cache.columns = self.columns
        return cache

    def continued_positions(
        self, position_ids: Tensor, attention_mask: Tensor | None, rows: int
    ) -> Tensor:
        """Positions for generate(), which itself counts them from the first column it is given.

        The states may have read tokens that are not among its columns, or have been reset: the
        next token of a row gets the position that follows in its document.

        Args:
            position_ids: int64 [B or 1, columns], as generate() counts.
            attention_mask: [B, columns]; None = no padding.
            rows: B, the prompts.

        Raises:
            UserError: for states of another number of rows.
        """
        states = self.states
        if states is None:
            return position_ids
        following = states["position"].next_position
        check_rows(len(following), rows)
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


def check_cache(cache: Any) -> None:
    """Raise UserError for what is no MemLMCache, nor None."""
    if cache is not None and not isinstance(cache, MemLMCache):
        raise UserError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold memories; pass a "
            "memlm.models.MemLMCache, or nothing"
        )


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a call goes on from, and what it gives back.

    Attributes:
        states: the states at its start; None = before the first token.
        cache: where the new states go; None = nowhere.
        returns_states: whether they are returned as `memory_states`.
        returns_cache: whether the cache is returned.
    """

    states: dict[str, MemoryState] | None
    cache: MemLMCache | None
    returns_states: bool
    returns_cache: bool


def carried(
    memory_states: dict[str, MemoryState] | None,
    past_key_values: MemLMCache | None,
    return_memory_states: bool,
    use_cache: bool | None,
    caches: bool,
) -> Carried:
    """What the arguments of a model's `forward` ask for.

    Args:
        memory_states, past_key_values, return_memory_states, use_cache: see
            `MemLMForCausalLM.forward`.
        caches: `use_cache` where it is None and no states are asked for.

    Raises:
        UserError: for a Cache that cannot hold memories.
        ValueError: for states given twice.
    """
    check_cache(past_key_values)
    if past_key_values is not None and memory_states is not None:
        raise ValueError("give memory_states or past_key_values, not both")
    returns_states = return_memory_states or memory_states is not None
    if use_cache is None:
        use_cache = caches and not returns_states
    if use_cache and past_key_values is None and memory_states is None:
        past_key_values = MemLMCache()
    states = past_key_values.states if past_key_values is not None else memory_states
    return Carried(states, past_key_values, returns_states, use_cache)
