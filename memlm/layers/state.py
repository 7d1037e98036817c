"""Per-row state that a layer carries from one call to the next."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass
class MemoryState(ABC):
    """A dataclass of tensors whose dimension 0 is the batch.

    Every operation returns a new state and leaves the old one as it was, so a state can be kept,
    forked and restored freely. Subclasses add tensor fields (or tuples of tensors) and `reset`.
    """

    @abstractmethod
    def reset(self, rows: Tensor | None = None) -> Self:
        """A state in which `rows` (bool [B]; None = all) are as new."""

    def _map(self, function) -> Self:
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values[field.name] = (
                tuple(function(item) for item in value)
                if isinstance(value, tuple)
                else function(value)
            )
        return type(self)(**values)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; items of a tuple field are named `field.index`."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                found.update({f"{field.name}.{i}": item for i, item in enumerate(value)})
            else:
                found[field.name] = value
        return found

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors().values())).shape[0]

    def select(self, index: Tensor) -> Self:
        """Rows `index` (int64 [N]), in that order; a row may be taken several times."""
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def reorder(self, index: Tensor) -> Self:
        """Rows in the order of `index`, as beam search asks for."""
        return self.select(index)

    def repeat(self, count: int) -> Self:
        """Every row `count` times, copies side by side."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def where(self, rows: Tensor, other: Self) -> Self:
        """This state in the rows where `rows` (bool [B]) is true, `other` elsewhere."""
        mine, theirs = self.tensors(), other.tensors()
        merged = {}
        for name, tensor in mine.items():
            mask = rows.view(-1, *[1] * (tensor.ndim - 1))
            merged[name] = torch.where(mask, tensor, theirs[name])
        return self.from_state_dict(merged)

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    def clone(self) -> Self:
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors of this state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, contiguous, ready for safetensors."""
        return {name: tensor.detach().contiguous() for name, tensor in self.tensors().items()}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `state_dict`.

        Raises:
            KeyError: when a field of the state is missing.
        """
        values = {}
        for field in dataclasses.fields(cls):
            if field.name in tensors:
                values[field.name] = tensors[field.name]
                continue
            items = []
            while f"{field.name}.{len(items)}" in tensors:
                items.append(tensors[f"{field.name}.{len(items)}"])
            if not items and field.default != ():
                raise KeyError(f"{cls.__name__}: the saved state has no {field.name!r}")
            values[field.name] = tuple(items)
        return cls(**values)
