"""What an entry of a corpus store consists of, and how many of them lie in memory."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from memlm.cuda.topk_search import quantize_keys
from memlm.errors import UserError, nearest
from memlm.retrieval.manifest import Content
from memlm.retrieval.store_files import check_metric
from memlm.retrieval.vector_store import ValueSpec

KeyType = Literal["float32", "float16", "int8"]
Columns = dict[str, Tensor]  # "keys", "scales" of int8 keys, and "values.NAME", each [N, ...]

_VALUE = "values."


@dataclass(frozen=True)
class CorpusLayout:
    """What never changes in a store.

    Attributes:
        key_size: numbers per key.
        key_type: how keys are kept; int8 with a scale each, see `memlm.cuda.topk_search`.
        metric: what they are searched with, see `memlm.cuda.topk_search`.
        projection: fingerprint of the weights that made them.
        values: name, shape and type of what is kept beside each key.
        max_bytes: the most that all entries may take, None = no limit.
        source: what the store is made from, as its maker wrote it.
    """

    key_size: int
    key_type: KeyType
    metric: str
    projection: str
    values: Mapping[str, ValueSpec]
    max_bytes: int | None
    source: Content

    def __post_init__(self):
        check_metric(self.metric)
        types = get_args(KeyType)
        if self.key_type not in types:
            raise UserError(
                f"key_type {self.key_type!r} is not one of {', '.join(types)}"
                f"{nearest(self.key_type, types)}"
            )

    @classmethod
    def from_content(cls, content: Content) -> Self:
        """As the manifest has it."""
        entries = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        entries["values"] = {
            name: ValueSpec(tuple(value["shape"]), getattr(torch, value["dtype"]))
            for name, value in content["values"].items()
        }
        return cls(**entries)

    def to_content(self) -> Content:
        """For the manifest."""
        content: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        content["values"] = {
            name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
            for name, spec in self.values.items()
        }
        return content

    @property
    def columns(self) -> dict[str, ValueSpec]:
        """What is written per entry, by the name of its tensor."""
        columns = {"keys": ValueSpec((self.key_size,), getattr(torch, self.key_type))}
        if self.key_type == "int8":
            columns["scales"] = ValueSpec((), torch.float32)
        return columns | {column_of(name): spec for name, spec in self.values.items()}

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of an entry, in memory as on disk."""
        return sum(spec.nbytes for spec in self.columns.values())

    def fits(self, columns: Columns, entries: int) -> bool:
        """Whether these are so many entries of this kind."""
        found = {name: (tuple(c.shape), c.dtype) for name, c in columns.items()}
        return found == {
            name: ((entries, *spec.shape), spec.dtype) for name, spec in self.columns.items()
        }

    def encode(self, keys: Tensor, values: Mapping[str, Tensor]) -> Columns:
        """Entries as they are kept, on the CPU.

        Args:
            keys: [N, key_size] floating point.
            values: by name, each [N, ...].

        Raises:
            UserError: for tensors that do not fit.
        """
        if keys.ndim != 2 or keys.shape[1] != self.key_size or not keys.is_floating_point():
            raise UserError(
                f"keys must be floating point [N, {self.key_size}], not {list(keys.shape)} of "
                f"{keys.dtype}"
            )
        if values.keys() != self.values.keys():
            raise UserError(
                f"an entry has the values {', '.join(self.values) or '(none)'}, not "
                f"{', '.join(values) or '(none)'}"
            )
        for name, spec in self.values.items():
            shape, value = [len(keys), *spec.shape], values[name]
            if list(value.shape) != shape or value.dtype != spec.dtype:
                raise UserError(
                    f"value {name!r} must be {shape} of {spec.dtype}, not {list(value.shape)} of "
                    f"{value.dtype}"
                )
        if self.key_type == "int8":
            kept, scales = quantize_keys(keys)
            columns = {"keys": kept, "scales": scales}
            finite = scales.isfinite()
        else:
            columns = {"keys": keys.detach().to(getattr(torch, self.key_type))}
            finite = columns["keys"].isfinite()
        if not bool(finite.all()):
            raise UserError(f"a key has numbers that are not finite as {self.key_type}")
        columns |= {column_of(name): values[name] for name in self.values}
        return {name: column.cpu() for name, column in columns.items()}


def column_of(name: str) -> str:
    """The tensor that holds the value `name`."""
    return f"{_VALUE}{name}"


@dataclass(frozen=True)
class Part:
    """Consecutive entries, from id `first` on."""

    first: int
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["keys"])

    @property
    def ids(self) -> slice:
        """The ids of its entries."""
        return slice(self.first, self.first + len(self))


def cut(part: Part, size: int) -> Iterator[Part]:
    """A part in pieces of at most `size` entries."""
    for start in range(0, len(part), size):
        rows = slice(start, start + size)
        yield Part(part.first + start, {name: c[rows] for name, c in part.columns.items()})


class Tail:
    """Entries in memory, whose room doubles when it is full."""

    def __init__(self, layout: CorpusLayout, first: int, room: int = 0):
        self._buffers = {
            name: torch.empty(room, *spec.shape, dtype=spec.dtype)
            for name, spec in layout.columns.items()
        }
        self._first = first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def part(self) -> Part:
        """All of them."""
        columns = {name: buffer[: self._count] for name, buffer in self._buffers.items()}
        return Part(self._first, columns)

    def append(self, columns: Columns) -> None:
        """Add entries."""
        total = self._count + len(columns["keys"])
        for name, buffer in self._buffers.items():
            if total > len(buffer):
                larger = buffer.new_empty(max(total, 2 * len(buffer)), *buffer.shape[1:])
                larger[: self._count] = buffer[: self._count]
                self._buffers[name] = larger
            self._buffers[name][self._count : total] = columns[name]
        self._count = total


def repack(
    parts: Iterable[Part], hidden: Tensor | None, size: int, layout: CorpusLayout
) -> Iterator[Part]:
    """The entries that are not hidden (bool [entries]; None = all), `size` at a time."""
    full = Tail(layout, 0, room=size)
    for block in (block for part in parts for block in cut(part, size)):
        rows = torch.arange(len(block))
        if hidden is not None:
            rows = rows[~hidden[block.ids]]
        while len(rows):
            fitting, rows = rows.tensor_split([size - len(full)])
            full.append({name: column[fitting] for name, column in block.columns.items()})
            if len(full) == size:
                yield full.part
                full = Tail(layout, 0, room=size)
    yield full.part
