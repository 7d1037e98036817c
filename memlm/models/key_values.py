"""Keys and values of a pretrained model's attention, carried from call to call.

They are kept in a state of their own instead of a transformers cache: a state is never changed in
place, so gradient checkpointing may run a layer twice, and every row may be reset, chosen or moved.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class KeyValueState(MemoryState):
    """What later tokens of the carried document may still see.

    Attributes:
        keys, values: of every layer [B, heads, S, head_dim], the last tokens of `positions`; a
            layer with a window keeps no more than the window reaches.
        positions: int64 [B, S of the longest layer], position within the document, -1 = empty.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor

    @classmethod
    def empty(
        cls, batch_size: int, sizes: list[tuple[int, int]], device=None, dtype=None
    ) -> "KeyValueState":
        """Nothing yet, for layers of so many (heads, channels per head)."""
        keys, values = (
            tuple(
                torch.zeros(batch_size, heads, 0, head_dim, device=device, dtype=dtype)
                for heads, head_dim in sizes
            )
            for _ in range(2)
        )
        return cls(keys, values, torch.zeros(batch_size, 0, dtype=torch.int64, device=device))

    def reset(self, rows: Tensor | None = None) -> "KeyValueState":
        if rows is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.positions.device)
        positions = self.positions.masked_fill(rows[:, None], -1)
        return KeyValueState(self.keys, self.values, positions)


class KeyValues:
    """The cache and the masks of one call, as the attention layers of the model get them.

    Args:
        state: what the rows carry.
        context: positions and documents of the call.
        windows: what the attention of every layer sees in the model itself, None = all.
        cap: what it sees at most, None = as in the model.
        implementation: the model's attention: sdpa, eager or a flash attention.
    """

    def __init__(
        self,
        state: KeyValueState,
        context: CallContext,
        windows: list[int | None],
        cap: int | None,
        implementation: str,
    ):
        self.state = state
        self.context = context
        self.windows = windows
        self.cap = cap
        self.implementation = implementation
        self.reaches = [min(filter(None, (window, cap)), default=None) for window in windows]
        layout = context.layout
        self.packed = not layout.uniform and bool((layout.document > 0).any())
        continued = (layout.document == 0).any(1, keepdim=True)
        self.carried = torch.where((state.positions >= 0) & continued, 0, -1)  # its documents
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._new: dict[int, tuple[Tensor, Tensor]] = {}
        self._finished = False

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, S + T, head_dim] of the carried and the given tokens.

        The method of a transformers cache; running it a second time changes nothing.
        """
        if self.state.keys[layer_idx].shape[2]:
            keys = torch.cat([self.state.keys[layer_idx].to(keys.dtype), keys], dim=2)
            values = torch.cat([self.state.values[layer_idx].to(values.dtype), values], dim=2)
        if not self._finished:
            self._new[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Carried tokens of a layer."""
        return self.state.keys[layer_idx].shape[2]

    def mask(self, index: int, own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask of a layer's attention.

        Args:
            index: the layer.
            own: the mask that the model made from this call's tokens, without what is carried.
            dtype: of the hidden states.

        Raises:
            UserError: for an attention implementation that cannot have the mask it needs.
        """
        layout = self.context.layout
        carried, window, reach = (
            self.get_seq_length(index),
            self.windows[index],
            self.reaches[index],
        )
        narrower = reach != window and reach < layout.valid.shape[1]
        holes = window is not None and not layout.uniform
        if not (carried or self.packed or narrower or holes):
            return own
        if (carried, reach) not in self._masks:
            self._masks[carried, reach] = self._build(carried, window, reach, dtype)
        return self._masks[carried, reach]

    def _build(
        self, carried: int, window: int | None, reach: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        document, position = self.context.layout.document, self.context.position_ids
        skipped = self.carried.shape[1] - carried
        documents = torch.cat([self.carried[:, skipped:], document], 1)
        positions = torch.cat([self.state.positions[:, skipped:], position], 1)
        if self.implementation not in ("sdpa", "eager"):
            if "flash" not in self.implementation or self.packed or reach != window:
                raise UserError(
                    f"the attention implementation {self.implementation!r} cannot tell documents "
                    "packed in a row apart, nor have a window; load the model with "
                    'attn_implementation="sdpa"'
                )
            seen = documents >= 0
            return None if bool(seen.all()) else seen.long()
        distance = position[:, :, None] - positions[:, None, :]
        visible = (document[:, :, None] == documents[:, None, :]) & (distance >= 0)
        visible &= (documents >= 0)[:, None, :]
        if reach is not None:
            visible &= distance < reach
        if position.shape[1] == 1 and bool(visible.all()):
            return None
        # A padded query would otherwise see nothing, and softmax of nothing is NaN.
        diagonal = torch.eye(position.shape[1], dtype=torch.bool, device=position.device)
        visible |= (document < 0)[:, :, None] & F.pad(diagonal, (carried, 0))
        visible = visible[:, None]
        if self.implementation == "sdpa":
            return visible
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)

    def finish(self) -> KeyValueState:
        """The new state: the last document of each row, and of it what a window can still reach.

        Raises:
            UserError: when a layer has not handed over its keys and values.
        """
        layout = self.context.layout
        new, self._new, self._finished = self._new, {}, True
        if len(new) != len(self.windows):
            missing = sorted(set(range(len(self.windows))) - set(new))
            raise UserError(
                f"the attention of layers {missing} hands no keys and values to a cache, so this "
                "model cannot carry states or generate with a memory"
            )
        documents = torch.cat([self.carried, layout.document], 1)
        positions = torch.cat([self.state.positions, self.context.position_ids], 1)
        last = layout.document.amax(1, keepdim=True)
        untouched = F.pad(self.state.positions >= 0, (0, layout.document.shape[1]))
        keep = torch.where(last < 0, untouched, documents == last)
        whole = bool(keep.all())
        orders: dict[int, Tensor] = {}
        keys, values = [], []
        for index, reach in enumerate(self.reaches):
            columns = new[index][0].shape[2]
            if columns not in orders:
                # Padding and former documents may lie between kept tokens: to the right end, all
                # of them in order, and away with the columns that no row keeps.
                own = keep[:, keep.shape[1] - columns :]
                count = columns if whole else int(own.sum(1).max())
                orders[columns] = (
                    own.to(torch.int8).sort(dim=1, stable=True).indices[:, columns - count :]
                )
            order = orders[columns]
            start = 0 if reach is None else max(0, order.shape[1] - (reach - 1))
            for tensor, kept in zip(new[index], (keys, values), strict=True):
                if not whole:
                    picked = order[:, None, :, None].expand(
                        -1, tensor.shape[1], -1, tensor.shape[3]
                    )
                    tensor = tensor.gather(2, picked)
                kept.append(_alone(tensor[:, :, start:]))
        longest = max(tensor.shape[2] for tensor in keys)
        positions = torch.where(keep, positions, -1)
        if not whole:
            positions = positions.gather(1, keep.to(torch.int8).sort(dim=1, stable=True).indices)
        positions = positions[:, positions.shape[1] - longest :]
        return KeyValueState(tuple(keys), tuple(values), _alone(positions))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger one: that would be kept alive."""
    if (
        tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
