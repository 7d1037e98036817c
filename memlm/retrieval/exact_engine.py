"""The engine that compares every entry with every query."""

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda import topk_search
from memlm.cuda.ordered_topk import ordered_topk
from memlm.cuda.topk_search import Metric, quantize_keys
from memlm.errors import UserError, nearest
from memlm.retrieval.engine import RetrievalEngine, ascending
from memlm.retrieval.manifest import SHARD_BYTES, Content, Shard, write_shard

BLOCK = 1 << 16  # most rows of a block
KEY_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


class Rows:
    """Rows that grow in number, in blocks: full blocks are not moved when rows are added."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._counts: list[int] = []  # rows in use of each buffer

    @property
    def blocks(self) -> list[Tensor]:
        """The rows in order, at most BLOCK in each tensor; they share memory with this object."""
        pairs = zip(self._buffers, self._counts, strict=True)
        return [buffer[:count] for buffer, count in pairs]

    @property
    def nbytes(self) -> int:
        """Bytes of rows and of the room that is ready for more."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def borrow(self, block: Tensor) -> None:
        """Take a block as it is, without a copy; then nothing may be appended."""
        self._buffers.append(block)
        self._counts.append(len(block))

    def append(self, rows: Tensor) -> None:
        """Copy rows to the end. The last block doubles until it has BLOCK rows."""
        while len(rows):
            if not self._buffers or self._counts[-1] == BLOCK:
                self._buffers.append(rows.new_empty(0, *rows.shape[1:]))
                self._counts.append(0)
            count = self._counts[-1]
            new = min(len(rows), BLOCK - count)
            if count + new > len(self._buffers[-1]):
                size = min(max(count + new, 2 * count), BLOCK)
                buffer = rows.new_empty(size, *rows.shape[1:])
                buffer[:count] = self._buffers[-1][:count]
                self._buffers[-1] = buffer
            self._buffers[-1][count : count + new] = rows[:new]
            self._counts[-1] = count + new
            rows = rows[new:]

    def select(self, keep: Tensor) -> "Rows":
        """The rows where bool `keep` [all rows] is True."""
        chosen, start = Rows(), 0
        for block in self.blocks:
            chosen.append(block[keep[start : start + len(block)]])
            start += len(block)
        return chosen


class ExactEngine(RetrievalEngine):
    """Every entry is compared with every query, by `memlm.cuda.topk_search`.

    Entries stand in the order of their ids, in blocks that fill up; adding ids that are not higher
    than all others copies the store once. Keys of less than float32 are compared as what they were
    rounded to; int8 keys are whole numbers times a factor of each entry.

    Args:
        dim: channels of a vector.
        metric: dot, cosine or l2.
        dtype: of the stored keys: float32, float16 or int8.
        device: where they are.
    """

    name = "exact"
    exact = True

    def __init__(
        self,
        dim: int,
        metric: Metric = "dot",
        dtype: Literal["float32", "float16", "int8"] = "float32",
        device: torch.device | str = "cpu",
    ):
        super().__init__(dim, metric)
        if dtype not in KEY_TYPES:
            raise UserError(
                f"exact: dtype {dtype!r} is not one of {', '.join(KEY_TYPES)}"
                f"{nearest(dtype, KEY_TYPES)}"
            )
        self.dtype, self.device = KEY_TYPES[dtype], torch.device(device)
        self._keys = Rows()  # [entries, dim]
        self._scales = Rows()  # float32 [entries]; none unless keys are int8

    @property
    def nbytes(self) -> int:
        """Bytes of keys, scales and ids."""
        return self._keys.nbytes + self._scales.nbytes + self.ids.nbytes

    def _options(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def _empty(cls, content: Content) -> Self:
        return cls(content["dim"], content["metric"], content["dtype"])

    def _add(self, keys: Tensor, ids: Tensor) -> None:
        keys, scales = self._stored(keys.to(self.device))
        if not (keys if scales is None else scales).isfinite().all():
            raise UserError(f"exact: keys are too large for {self._options()['dtype']}")
        if (len(self.ids) and not ids.min() > self.ids[-1]) or not ascending(ids):
            order = torch.cat((self.ids, ids)).argsort().to(self.device)
            keys = torch.cat((*self._keys.blocks, keys))[order]
            if scales is not None:
                scales = torch.cat((*self._scales.blocks, scales))[order]
            self._keys, self._scales = Rows(), Rows()
        self._keys.append(keys)
        if scales is not None:
            self._scales.append(scales)

    def _stored(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys in the dtype of the store, and the factor of each where that is int8."""
        if self.dtype != torch.int8:
            return keys.to(self.dtype), None
        return quantize_keys(keys)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = queries.to(self.device, torch.float32)[None]
        scales = self._scales.blocks
        scores, places, start = [], [], 0
        for number, block in enumerate(self._keys.blocks):
            extra = {"scales": scales[number][None]} if scales else {}
            found = topk_search(queries, block[None], min(k, len(block)), self.metric, **extra)
            scores.append(found[0][0])
            places.append(found[1][0] + start)
            start += len(block)
        # Lower ids stand first: among equal scores they win.
        best, order = ordered_topk(torch.cat(scores, 1), min(k, start))
        ids = self.ids.to(self.device)[torch.cat(places, 1).gather(1, order)]
        ids = ids.masked_fill(best == -torch.inf, -1)
        missing = k - best.shape[1]
        return F.pad(best, (0, missing), value=-torch.inf), F.pad(ids, (0, missing), value=-1)

    def _remove(self, ids: Tensor, keep: Tensor) -> None:
        keep = keep.to(self.device)
        self._keys, self._scales = self._keys.select(keep), self._scales.select(keep)

    def _write(self, folder: Path, number: int) -> list[Shard]:
        scales = self._scales.blocks
        shards: list[Shard] = []
        tensors, entries, size = {"ids": self.ids}, 0, 0
        for index, block in enumerate(self._keys.blocks):
            if size and size + block.nbytes > SHARD_BYTES:
                shards.append(write_shard(folder, number + len(shards), tensors, entries))
                tensors, entries, size = {}, 0, 0
            tensors[f"keys.{index}"] = block.cpu()
            if scales:
                tensors[f"scales.{index}"] = scales[index].cpu()
            entries, size = entries + len(block), size + block.nbytes
        return [*shards, write_shard(folder, number + len(shards), tensors, entries)]

    def _read(self, pieces: list[dict[str, Tensor]], content: Content) -> None:
        tensors = {name: tensor for piece in pieces for name, tensor in piece.items()}
        for rows, kind in ((self._keys, "keys"), (self._scales, "scales")):
            for index in range(sum(name.startswith(f"{kind}.") for name in tensors)):
                block = tensors[f"{kind}.{index}"]
                if self.read_only:
                    rows.borrow(block)
                else:
                    rows.append(block)
