"""What engines that search one store of vectors have in common."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from memlm.cuda.topk_search import METRICS, Metric
from memlm.errors import UserError, nearest
from memlm.retrieval.manifest import (
    Content,
    Shard,
    as_content,
    commit,
    load_current,
    lock_for_writing,
    previous_content,
    read_manifest,
    read_shard,
    shards_of,
)

KIND = "RetrievalEngine"  # the class that manifests of saved engines name
MOST_IDS = torch.iinfo(torch.int64).max


class RetrievalEngine(ABC):
    """Entries of one store, a vector and an id each, and the search among them.

    Scores are those of `memlm.cuda.topk_search` for every engine: "dot" = q.k, "cosine" =
    q.k / (|q| |k|), "l2" = 2 q.k - |k|^2 (-|q - k|^2 up to a constant of the query).

    Attributes:
        name: of the engine.
        exact: whether a search finds the k highest scores of what is stored.
        dim: channels of a vector.
        metric: dot, cosine or l2.
        ids: int64 [entries], those of the entries, ascending.
        read_only: whether entries are memory-mapped; then nothing can be added or removed.

    Args:
        dim: channels of a vector.
        metric: dot, cosine or l2.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]

    def __init__(self, dim: int, metric: Metric = "dot"):
        if dim < 1:
            raise UserError(f"{self.name}: dim is {dim}, it must be at least 1")
        if metric not in METRICS:
            raise UserError(
                f"{self.name}: metric {metric!r} is not one of {', '.join(METRICS)}"
                f"{nearest(metric, METRICS)}"
            )
        self.dim, self.metric = dim, metric
        self.ids = torch.empty(0, dtype=torch.int64)
        self.read_only = False
        self._next_id = 0

    def __len__(self) -> int:
        """How many entries are stored."""
        return len(self.ids)

    def add(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """Store entries.

        Args:
            keys: [M, dim], finite.
            ids: int64 [M], at least 0, none of them stored already; None = the numbers that follow
                the highest id that was ever stored.

        Returns:
            The ids, int64 [M].

        Raises:
            UserError: for keys or ids that cannot be stored (then none of them is), or for a
                memory-mapped engine.
        """
        self._check_writable("add entries to")
        self._check_vectors(keys, "keys")
        if ids is None:
            if self._next_id + len(keys) > MOST_IDS:
                raise UserError(f"{self.name}: no ids are left after {self._next_id - 1}; give ids")
            ids = torch.arange(self._next_id, self._next_id + len(keys))
        else:
            ids = self._new_ids(ids, len(keys))
        if len(keys):
            self._add(keys.detach(), ids)
            in_order = len(self.ids) == 0 or bool(ids[0] > self.ids[-1])
            self.ids = torch.cat((self.ids, ids))
            if not (in_order and ascending(ids)):
                self.ids = self.ids.sort().values
            self._next_id = max(self._next_id, int(self.ids[-1]) + 1)
        return ids

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The entries that score best, best first, equal scores by lowest id.

        Args:
            queries: [N, dim], of any device.
            k: results per query, at least 1; may exceed the number of entries.

        Returns:
            scores: float32 [N, k], -inf where fewer than k entries are found.
            ids: int64 [N, k], -1 there.
        """
        self._check_vectors(queries, "queries")
        if k < 1:
            raise UserError(f"{self.name}: k = {k} must be at least 1")
        if len(self) and len(queries):
            scores, ids = self._search(queries.detach(), k)
        else:
            scores = torch.full((len(queries), k), -torch.inf)
            ids = torch.full((len(queries), k), -1)
        return scores.to(queries.device), ids.to(queries.device)

    def remove(self, ids: Tensor) -> None:
        """Forget entries: they are never found again, and their ids may be used anew.

        Args:
            ids: int64 [M], all of them stored.

        Raises:
            UserError: for an id that is not stored (then nothing is removed), ids of another type,
                an engine that cannot remove, or a memory-mapped one.
        """
        self._check_writable("remove entries from")
        if ids.dtype != torch.int64:
            raise UserError(f"{self.name}: ids to remove must be int64, not {ids.dtype}")
        ids = ids.cpu().unique()
        unknown = ids[~torch.isin(ids, self.ids)]
        if len(unknown):
            raise UserError(f"{self.name}: no entry has the id {int(unknown[0])}")
        if len(ids):
            keep = ~torch.isin(self.ids, ids)
            self._remove(ids, keep)
            self.ids = self.ids[keep]

    def save(self, folder: str | Path) -> None:
        """Write the engine into a folder, in the place of the engine that may be there.

        When this process dies in whatever moment, the folder holds the engine before or this one.

        Raises:
            UserError: for a folder that holds something else or cannot be written, or while another
                writer has it open.
        """
        folder = Path(folder)
        with lock_for_writing(folder):
            previous = previous_content(folder, KIND)
            number = previous["next_shard"] if previous else 0
            shards = self._write(folder, number)
            content = {
                "engine": self.name,
                "metric": self.metric,
                "dim": self.dim,
                "count": len(self),
                "next_id": self._next_id,
                **self._options(),
                "next_shard": number + len(shards),
                "shards": as_content(shards),
            }
            commit(folder, KIND, content)

    @classmethod
    def load(
        cls, folder: str | Path, *, memory_map: bool = False, verify: bool = True
    ) -> "RetrievalEngine":
        """The engine that `save` wrote.

        Args:
            folder: where it is.
            memory_map: leave the entries in the file, to be read when they are searched and shared
                by all processes that map it; such an engine is read-only.
            verify: read the whole file now and compare its checksum; without it only the size is
                compared.

        Raises:
            UserError: when there is no such engine, or a file is missing, truncated or altered.
        """
        folder = Path(folder)

        def load(content: Content) -> "RetrievalEngine":
            if content["engine"] != cls.name:
                raise UserError(f"{folder}: holds the engine {content['engine']}, not {cls.name}")
            engine = cls._empty(content)
            engine.read_only = memory_map
            engine._next_id = content["next_id"]
            pieces = [read_shard(folder, shard, verify) for shard in shards_of(content)]
            engine.ids = pieces[0].pop("ids").clone()
            engine._read(pieces, content)
            return engine

        return load_current(folder, KIND, load)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys, ids and what makes the search fast, mapped ones included."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """What `_empty` and `_read` need beside metric and dim, as JSON."""

    @classmethod
    @abstractmethod
    def _empty(cls, content: Content) -> Self:
        """An engine of the class without entries, as a manifest describes it."""

    @abstractmethod
    def _add(self, keys: Tensor, ids: Tensor) -> None:
        """Store entries; `self.ids` does not have them yet."""

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `search`; there are entries and queries."""

    @abstractmethod
    def _remove(self, ids: Tensor, keep: Tensor) -> None:
        """Forget `ids`; bool `keep` says the same of `self.ids`, which still has them."""

    @abstractmethod
    def _write(self, folder: Path, number: int) -> list[Shard]:
        """Write shards from `number` on; the first has `ids`."""

    @abstractmethod
    def _read(self, pieces: list[dict[str, Tensor]], content: Content) -> None:
        """Take the entries from memory-mapped tensors, copying them unless `self.read_only`."""

    def _check_writable(self, action: str) -> None:
        if self.read_only:
            raise UserError(
                f"{self.name}: cannot {action} a memory-mapped engine; load it with "
                "memory_map=False"
            )

    def _check_vectors(self, vectors: Tensor, what: str) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim or not vectors.is_floating_point():
            raise UserError(
                f"{self.name}: {what} must be floating point [*, {self.dim}], not {vectors.dtype} "
                f"{list(vectors.shape)}"
            )
        if what == "keys" and not vectors.isfinite().all():
            raise UserError(f"{self.name}: keys hold NaN or infinity")

    def _new_ids(self, ids: Tensor, count: int) -> Tensor:
        if ids.shape != (count,) or ids.dtype != torch.int64:
            raise UserError(
                f"{self.name}: ids must be int64 [{count}] as the keys, not {ids.dtype} "
                f"{list(ids.shape)}"
            )
        ids = ids.cpu()
        if count and int(ids.min()) < 0:
            raise UserError(f"{self.name}: the id {int(ids.min())} is negative")
        values, counts = ids.unique(return_counts=True)
        twice = values[(counts > 1) | torch.isin(values, self.ids)]
        if len(twice):
            raise UserError(f"{self.name}: the id {int(twice[0])} is there already")
        return ids


def read_engine_manifest(folder: Path) -> Content:
    """What a saved engine's manifest says; UserError where there is none."""
    return read_manifest(folder, KIND)


def ascending(ids: Tensor) -> bool:
    """Whether each id is higher than the one before it."""
    return bool((ids[1:] > ids[:-1]).all())
