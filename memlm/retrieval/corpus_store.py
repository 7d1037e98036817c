"""A large store on disk that many processes search: memory-mapped shards and a tail in memory."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock
from torch import Tensor

from memlm.errors import UserError, nearest
from memlm.retrieval.corpus_layout import CorpusLayout, KeyType, Part, Tail, column_of, cut, repack
from memlm.retrieval.corpus_search import build_index, merge, open_index, search_parts, take_rows
from memlm.retrieval.manifest import (
    MANIFEST_FILE,
    SHARD_BYTES,
    Content,
    Shard,
    as_content,
    commit,
    index_folder,
    load_current,
    lock_for_writing,
    read_manifest,
    read_shard,
    shards_of,
    write_shard,
)
from memlm.retrieval.store_files import check_owner
from memlm.retrieval.vector_store import ValueSpec

_KIND = "CorpusStore"


def store_fingerprint(folder: str | Path) -> str:
    """SHA-256 of what a committed store holds, wherever it lies and whatever index it has.

    Raises:
        UserError: when this is no such store.
    """
    content = read_manifest(Path(folder), _KIND)
    parts = [
        (shard.entries, shard.sha256)
        for shard in shards_of(content)
        if shard.file != content["progress_tensors"]
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class CorpusStore:
    """Entries of a key and named values, with exact search over all of them.

    Ids count entries from 0 in the order of adding. They stay what they are until `compact` drops
    the removed entries and numbers the others anew.

    What was added is found at once, but lies in memory until `commit` writes it. A folder has one
    writer at a time. Readers see what was committed when they opened it, and go on seeing that
    whatever a writer does.

    Attributes:
        folder: where it lies.
        layout: what an entry consists of, and for which metric and projection.
        progress: the note of the last commit.
        progress_tensors: the tensors of that note, by name.
        index: what an index over the first entries says of itself: folder (within this one),
            engine, entries, recall (of 32, as it was measured); None = there is none.
    """

    def __init__(
        self, folder: Path, content: Content, lock: FileLock | None, verify: bool, engine: str
    ):
        """Use `open` or `create`."""
        self.folder = folder
        self.layout = CorpusLayout.from_content(content)
        self._lock = lock
        self._take_up(content, verify)
        index = None if self.index is None else self.index["folder"]
        self._engine = open_index(folder, engine, index, verify)

    def _take_up(self, content: Content, verify: bool) -> None:
        """Be what the manifest says."""
        self.progress: Content = content["progress"]
        self._next_shard: int = content["next_shard"]
        shards = {shard.file: shard for shard in shards_of(content)}
        self._removal = shards.pop(content["removal"], None)
        note = shards.pop(content["progress_tensors"], None)
        self.progress_tensors = {} if note is None else read_shard(self.folder, note, verify=True)
        self._shards = list(shards.values())
        self._base: list[Part] = []
        entries = 0
        for shard in self._shards:
            columns = read_shard(self.folder, shard, verify)
            if not self.layout.fits(columns, shard.entries):
                raise UserError(f"{self.folder / shard.file}: altered since it was written")
            self._base.append(Part(entries, columns))
            entries += shard.entries
        self._tail = Tail(self.layout, entries)
        self._hidden: Tensor | None = None  # bool [entries], once an entry was removed
        if self._removal is not None:
            self._hide(read_shard(self.folder, self._removal, verify=True)["ids"])
        self._removal_written = True
        self.index: Content | None = content["index"]

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        key_size: int,
        metric: str,
        projection: str,
        values: Mapping[str, ValueSpec],
        key_type: KeyType = "float16",
        max_bytes: int | None = None,
        source: Content | None = None,
    ) -> Self:
        """A new store without entries, open for writing; arguments as in `CorpusLayout`.

        Raises:
            UserError: for a folder that holds a store or cannot be written, or a wrong choice.
        """
        layout = CorpusLayout(
            key_size, key_type, metric, projection, values, max_bytes, source or {}
        )
        folder = Path(folder)
        lock = lock_for_writing(folder)
        if (folder / MANIFEST_FILE).exists():
            lock.release()
            raise UserError(f"{folder}: there is a {MANIFEST_FILE} already; open or remove it")
        content = {**layout.to_content(), "progress": {}, "next_shard": 0}
        content |= {"removal": None, "progress_tensors": None, "index": None, "shards": []}
        commit(folder, _KIND, content)
        return cls(folder, content, lock, verify=False, engine="exact")

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        read_only: bool = True,
        projection: str | None = None,
        metric: str | None = None,
        verify: bool = False,
        engine: str = "exact",
    ) -> Self:
        """The store of a folder.

        Args:
            folder: where it lies.
            read_only: False = to write into it.
            projection: the fingerprint of the weights that make the queries; None = any.
            metric: what it will be searched with; None = any.
            verify: read every byte now and compare SHA-256. Else sizes and headers are looked at,
                which takes no time that grows with the store.
            engine: "exact"; the name of the engine whose index the store has; or "auto", its index
                if it has one, else exact.

        Raises:
            UserError: when this is no such store, a file is missing, truncated or altered, or
                another writer has it open.
        """
        folder = Path(folder)
        lock = None
        if not read_only:
            read_manifest(folder, _KIND)
            lock = lock_for_writing(folder)

        def load(content: Content) -> Self:
            check_owner(folder, content, projection, metric)
            return cls(folder, content, lock, verify, engine)

        try:
            return load_current(folder, _KIND, load)
        except UserError:
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        """Give up the right to write; what was not committed stays in memory alone."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Entries, removed ones included: every id is below it."""
        return self._tail.part.ids.stop

    @property
    def read_only(self) -> bool:
        """Whether it refuses to be written."""
        return self._lock is None

    @property
    def engine(self) -> str:
        """What `search` searches with."""
        return "exact" if self._engine is None else self._engine.name

    @property
    def values(self) -> dict[str, Tensor]:
        """The values of all entries by name, each [entries, ...].

        A view of the file where one shard holds them all, else a copy; `take` copies nothing else
        than what it returns.
        """
        parts = self._parts()
        names = {name: column_of(name) for name in self.layout.values}
        if len(parts) == 1:
            return {name: parts[0].columns[column] for name, column in names.items()}
        return {
            name: torch.cat([part.columns[column] for part in parts])
            for name, column in names.items()
        }

    def take(self, name: str, ids: Tensor) -> Tensor:
        """The value `name` of the entries `ids` (int64, any shape; -1 reads as zeros).

        Returns [*ids.shape, ...] on the device of `ids`.
        """
        if name not in self.layout.values:
            hint = nearest(name, self.layout.values)
            raise UserError(f"{self.folder}: has no value {name!r}{hint}")
        spec = self.layout.values[name]
        taken = take_rows(self._parts(), column_of(name), ids.cpu().flatten())
        return taken.view(ids.shape + spec.shape).to(ids.device)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best entries of every query: all of them exactly, or those of `engine`.

        Exact search reads keys part by part, so no memory of the size of the store is taken; they
        are sent to the device of the queries in blocks. An engine searches the entries that it was
        built over; those added later are searched exactly.

        Args:
            queries: [N, key_size].
            k: results per query.

        Returns:
            scores [N, k] float32, best first, equal scores lowest id first, and ids int64 [N, k];
            -inf and -1 where there are fewer.
        """
        if queries.ndim != 2 or queries.shape[1] != self.layout.key_size:
            raise UserError(
                f"{self.folder}: queries must be [N, {self.layout.key_size}], not "
                f"{list(queries.shape)}"
            )
        options = (k, self.layout.metric, self._hidden)
        if self._engine is None:
            return search_parts(queries, self._parts(), *options)
        later = [part for part in self._parts() if part.first >= self.index["entries"]]
        return merge(self._engine.search(queries, k), search_parts(queries, later, *options))

    def add(self, keys: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """New entries: found from now on, written by the next `commit`.

        Args:
            keys: [N, key_size] floating point.
            values: by name, each [N, ...].

        Returns:
            their ids, int64 [N].

        Raises:
            UserError: for a read-only store, tensors that do not fit, or when all entries together
                would exceed max_bytes; nothing is added then.
        """
        self._require_writer("add")
        try:
            columns = self.layout.encode(keys, values)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error
        first, total = len(self), len(self) + len(keys)
        each, limit = self.layout.bytes_per_entry, self.layout.max_bytes
        if limit is not None and total * each > limit:
            raise UserError(
                f"{self.folder}: {total} entries of {each} bytes exceed max_bytes = {limit}, which "
                f"holds {limit // each}"
            )
        self._tail.append(columns)
        if self._hidden is not None:
            self._hidden = torch.cat((self._hidden, torch.zeros(len(keys), dtype=torch.bool)))
        return torch.arange(first, total)

    def remove(self, ids: Tensor) -> None:
        """Let `search` not find the entries `ids` (int64 [N]) any more; written by `commit`.

        `compact` gives their room back. An index is given up: it would find them.

        Raises:
            UserError: for a read-only store, an id that no entry has, or ids of another type.
        """
        self._require_writer("remove")
        fit = ids.ndim == 1 and ids.dtype == torch.int64
        if not fit or bool(((ids < 0) | (ids >= len(self))).any()):
            raise UserError(f"{self.folder}: ids to remove must be int64 in 0 .. {len(self) - 1}")
        if len(ids):
            self._hide(ids)
            self._removal_written = False
            self.index = self._engine = None

    def commit(
        self, progress: Content | None = None, tensors: dict[str, Tensor] | None = None
    ) -> None:
        """Write what was added and removed. A process that dies meanwhile leaves the store before.

        Args:
            progress: a note for whoever goes on, any JSON; None = the last one stays, without
                tensors.
            tensors: contiguous tensors on the CPU that belong to the note.
        """
        self._require_writer("commit")
        shards = self._shards + self._write(cut(self._tail.part, self._shard_entries))
        removal = self._removal
        if not self._removal_written:
            removal = self._write_shard({"ids": self._hidden.nonzero()[:, 0]}, 0)
        self._publish(shards, removal, progress, tensors)

    def compact(self) -> None:
        """Write everything but the removed entries into few shards; ids count anew.

        The SHA-256 of what is read is verified. Until it is done, both forms take disk space; a
        process that dies meanwhile leaves the store before.

        Raises:
            UserError: for a read-only store, or a shard that was altered.
        """
        self._require_writer("compact")
        for shard in self._shards:
            read_shard(self.folder, shard, verify=True)
        kept = repack(self._parts(), self._hidden, self._shard_entries, self.layout)
        shards = self._write(kept)
        self.index = self._engine = None
        self._publish(shards, None)

    def build_index(self, engine: str = "auto", queries: Tensor | None = None) -> None:
        """Commit, and build an index over all entries, with which `open` can search.

        What "auto" took and the recall of the index, against exact search, are logged. A process
        that dies meanwhile leaves the store before.

        Args:
            engine: an engine of `memlm.retrieval.choice`; "auto" = exact search for up to 262,144
                entries, inverted lists above; "exact" gives up the index.
            queries: [N, key_size], a sample of those to come, to measure the recall with; None =
                some of the keys, each of which finds itself.

        Raises:
            UserError: for a read-only store or an unknown engine.
        """
        self._require_writer("build an index")
        self.commit()
        built, recall = build_index(engine, self._parts(), self.layout, self._hidden, queries)
        index = None
        if built is not None:
            place = index_folder(self._next_shard)
            index = {"folder": place, "engine": built.name, "entries": len(self), "recall": recall}
            self._next_shard += 1
            built.save(self.folder / place)
        self._engine, self.index = built, index
        self._publish(self._shards, self._removal)

    @property
    def _shard_entries(self) -> int:
        """Entries of a full shard."""
        return max(SHARD_BYTES // self.layout.bytes_per_entry, 1)

    def _write(self, parts: Iterable[Part]) -> list[Shard]:
        """Shards of parts; no manifest names them yet."""
        return [self._write_shard(part.columns, len(part)) for part in parts if len(part)]

    def _write_shard(self, tensors: dict[str, Tensor], entries: int) -> Shard:
        shard = write_shard(self.folder, self._next_shard, tensors, entries)
        self._next_shard += 1
        return shard

    def _publish(
        self,
        shards: list[Shard],
        removal: Shard | None,
        progress: Content | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Make these shards what the store is."""
        note = self._write_shard(tensors, 0) if tensors else None
        others = [shard for shard in (removal, note) if shard is not None]
        content = {
            **self.layout.to_content(),
            "progress": self.progress if progress is None else progress,
            "next_shard": self._next_shard,
            "index": self.index,
            "removal": removal.file if removal else None,
            "progress_tensors": note.file if note else None,
            "shards": as_content([*shards, *others]),
        }
        commit(self.folder, _KIND, content)
        self._take_up(content, verify=False)

    def _require_writer(self, action: str) -> None:
        if self.read_only:
            raise UserError(f"{self.folder}: opened read-only, so it cannot {action}")

    def _parts(self) -> list[Part]:
        """All entries, in the order of their ids; at least one part."""
        return [*self._base, *([self._tail.part] if len(self._tail) or not self._base else [])]

    def _hide(self, ids: Tensor) -> None:
        if self._hidden is None:
            self._hidden = torch.zeros(len(self), dtype=torch.bool)
        self._hidden[ids.cpu()] = True
