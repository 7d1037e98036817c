"""Streams of the Hub, written through into shards: what was read once is never read again.

A streamed dataset is cut into chunks by the texts alone. Whichever process first needs a document
that is not there yet writes the next chunk under the folder's lock; the others find it. So the
shards are the same bytes for any number of processes and after any interruption, and a run that
goes on finds its place by adding up the lengths of documents.
"""

import bisect
import contextlib
import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.config import HubSource
from memlm.data.corpus import SPLITS, in_split
from memlm.data.hub import HubReader, find_revision
from memlm.data.shard_manifest import Content, make_identity, require_same, write_whole
from memlm.data.shard_writer import Chunk, write_chunk
from memlm.data.shards import local_share, locked, map_tensors, verify
from memlm.errors import UserError
from memlm.files import append_line, sync

JOURNAL_FILE = "stream.jsonl"
_FORMAT = "memlm stream"
_FIRST_CHUNK = 1 << 20  # bytes of text; doubled after every 16 chunks, up to 32 times as much
_AHEAD = 2  # chunks that are written before they are needed
_MAPPED = 64  # files held open in memory maps
_ADVICE = "choose another data.shards, or delete this folder to stream anew"
_logger = logging.getLogger(__name__)


class StreamLog:
    """The shards of one streamed dataset, which grow as they are read.

    A dataset of the Hub is read at the revision it had when its first chunk was written.

    Args:
        root: folder of the shards of any number of sources.
        source: the dataset.
        seed: of its shuffle buffer.
        tokenizer: tokenises its texts.
        fraction: `validation_fraction` of the data section.

    Attributes:
        folder: where the shards are.
        chunks: entries of the journal.

    Raises:
        UserError: for shards of another tokenizer, fraction or version, damaged shards, folders
            that cannot be written, and streams that cannot be read or changed meanwhile.
    """

    def __init__(
        self,
        root: str | Path,
        source: HubSource,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        fraction: float,
    ) -> None:
        self.source, self.seed, self.fraction = source, seed, fraction
        self.tokenizer = tokenizer
        self.chunks: list[Content] = []
        names = ("dataset", "config", "split", "column", "shuffle_buffer")
        described = {name: getattr(source, name) for name in names}
        if source.shuffle_buffer:
            described["seed"] = seed
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        self.folder = Path(root).expanduser() / f"stream-{digest[:12]}"
        self._journal = self.folder / JOURNAL_FILE
        self._place = 0  # bytes of the journal that were read
        self._mutex = threading.RLock()
        self._reading: _Reading | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._ahead: Future | None = None
        self._views = {split: LoggedDocuments(self, split) for split in SPLITS}
        self._open({"description": {"type": "hub", "streaming": True, **described}})

    def documents(self, split: str) -> "LoggedDocuments":
        """The documents of a split."""
        return self._views[split]

    @property
    def ended(self) -> bool:
        """Whether the whole stream is here."""
        return bool(self.chunks) and self.chunks[-1]["end"]

    def require(self, count: int) -> None:
        """Bring in at least `count` chunks, or all of a stream that ends before."""
        with self._mutex:
            while len(self.chunks) < count and not self.ended:
                if not self._read_journal():
                    with self._alone():
                        # Whoever had the lock before may have written it.
                        if not self._read_journal():
                            self._write_next()

    def read_ahead(self, chunk: int) -> None:
        """Write the chunks behind number `chunk` meanwhile, if this process is the one that does.

        Only a process whose stream stands at the end of the shards: for the others, getting there
        may be long.
        """
        reading, wanted = self._reading, chunk + 1 + _AHEAD
        if self.ended or wanted <= len(self.chunks):
            return
        if reading is None or reading.number != len(self.chunks):
            return
        if self._ahead is None or self._ahead.done():
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="stream")
            if self._ahead is not None:
                self._ahead.result()
            self._ahead = self._executor.submit(self.require, wanted)

    def _open(self, source: Content) -> None:
        identity = make_identity(self.tokenizer, self.fraction, source, _FIRST_CHUNK)
        identity["format"] = _FORMAT
        if not self._journal.exists():
            revision = find_revision(self.source)
            with self._alone():
                if not self._journal.exists():
                    header = _signed({**identity, "revision": revision})
                    write_whole(self._journal, f"{header}\n".encode())
                    sync(self.folder)
        with self._mutex:
            self._read_journal(identity)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                yield
        except OSError as error:
            raise UserError(
                f"data.shards: {self.folder} cannot be written ({error.strerror})"
            ) from error

    def _read_journal(self, identity: Content | None = None) -> bool:
        """Take in what the journal has gained; whether that is anything."""
        first = self._place == 0
        try:
            with self._journal.open("rb") as file:
                file.seek(self._place)
                gained = file.read()
        except OSError as error:
            raise UserError(f"{self._journal}: cannot be read ({error.strerror})") from error
        # A line without its end is being written, or its writer died.
        gained = gained[: gained.rfind(b"\n") + 1]
        entries = [self._parse(line) for line in gained.splitlines()]
        if first:
            if not entries:
                raise UserError(f"{self._journal}: damaged (it has no first line); {_ADVICE}")
            header = entries.pop(0)
            require_same(self.folder, header, identity or header)
            self.revision = header["revision"]
        files = [entry[split] for entry in entries for split in SPLITS if entry[split]]
        verify(self.folder, files, *(local_share() if first else (0, 1)))
        self._place += len(gained)
        for entry in entries:
            # The chunk that ends the stream counts once its documents do.
            for split, view in self._views.items():
                view.add(entry[split])
            self.chunks.append(entry)
        return bool(entries)

    def _parse(self, line: bytes) -> Content:
        try:
            entry = json.loads(line)
            checksum = entry.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            entry, checksum = None, ""
        if entry is None or checksum != _checksum(entry):
            raise UserError(f"{self._journal}: damaged (a line's SHA-256 differs); {_ADVICE}")
        return entry

    def _write_next(self) -> None:
        """Write one chunk more; the caller holds the folder's lock and has read the journal."""
        if self._journal.stat().st_size > self._place:
            # The line of a writer that died; the chunk comes again.
            os.truncate(self._journal, self._place)
        reading = self._reading_at(len(self.chunks))
        # Kept again once the chunk is: a stream that broke off would seem to have ended.
        self._reading = None
        texts, digest, ended = reading.take()
        parts: dict[str, list[str]] = {
            split: [text for text in texts if in_split(text, split, self.fraction)]
            for split in (SPLITS if self.fraction else SPLITS[:1])
        }
        entry = write_chunk(self.folder, Chunk(len(self.chunks), parts), self.tokenizer)
        sync(self.folder)
        entry |= {"texts": digest, "documents": len(texts), "end": ended, "state": reading.state}
        append_line(self._journal, _signed(entry))
        sync(self._journal)
        self._reading = reading
        self._read_journal()

    def _reading_at(self, number: int) -> "_Reading":
        """The stream where chunk `number` begins.

        From the state that was kept two chunks before where there is one, so that the last chunk
        comes again and tells whether this is the same stream; else from where this process stands
        or from the beginning.
        """
        if self._reading is not None and self._reading.number == number:
            return self._reading
        state = self.chunks[number - 2]["state"] if number > 1 else None
        if state is not None:
            try:
                reading = _Reading(self._reader(state), number - 1)
                self._pass_by(reading, number)
            except Exception as error:
                # Another version of the library may not take it; the beginning is always right.
                _logger.warning("%s: reading again from the beginning (%s)", self.folder, error)
            else:
                return reading
        reading, self._reading = self._reading, None
        if reading is None or reading.number > number:
            reading = _Reading(self._reader(None), 0)
        self._pass_by(reading, number)
        return reading

    def _reader(self, state: dict[str, Any] | None) -> HubReader:
        return HubReader(self.source, self.seed, state, self.revision)

    def _pass_by(self, reading: "_Reading", number: int) -> None:
        """Read up to chunk `number` without tokenising; raises UserError for other texts."""
        while reading.number < number:
            entry = self.chunks[reading.number]
            _, digest, _ = reading.take()
            if digest != entry["texts"]:
                raise UserError(
                    f"{self.folder}: {self.source.dataset!r} is not the stream that was written "
                    f"here (chunk {entry['chunk']} differs); {_ADVICE}"
                )


class LoggedDocuments:
    """The documents of one split of a stream log; at its end they come again in their order."""

    def __init__(self, log: StreamLog, split: str) -> None:
        self.log, self.split = log, split
        self._entries: list[Content | None] = []
        self._firsts: list[int] = []  # number of the first document of each chunk
        self._count = 0
        self._maps: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def add(self, entry: Content | None) -> None:
        """A chunk more; None = it has no documents of this split."""
        self._entries.append(entry)
        self._firsts.append(self._count)
        self._count += entry["documents"] if entry else 0

    def lengths(self, first: int) -> np.ndarray:
        """Of the documents from `first` on within its chunk, int64."""
        while first >= self._count and not self.log.ended:
            self.log.require(len(self._entries) + 1)
        if self._count == 0:
            raise UserError("data: the stream holds no text for this split")
        chunk, place = self._find(first)
        return self._map(chunk)["lengths"][place:]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document."""
        chunk, place = self._find(document)
        self.log.read_ahead(chunk)
        tensors = self._map(chunk)
        begin = int(tensors["starts"][place])
        return tensors["tokens"][begin + start : begin + stop]

    def forget(self, documents: Iterable[int]) -> None:
        """Nothing is held."""

    def _find(self, document: int) -> tuple[int, int]:
        if self.log.ended:
            document %= self._count
        chunk = bisect.bisect_right(self._firsts, document) - 1
        return chunk, document - self._firsts[chunk]

    def _map(self, chunk: int) -> dict[str, np.ndarray]:
        if chunk not in self._maps:
            if len(self._maps) == _MAPPED:
                self._maps.popitem(last=False)
            entry = self._entries[chunk]
            assert entry is not None
            tensors = map_tensors(self.log.folder / entry["file"])
            starts = np.cumsum(tensors["lengths"]) - tensors["lengths"]
            self._maps[chunk] = {**tensors, "starts": starts}
        self._maps.move_to_end(chunk)
        return self._maps[chunk]


class _Reading:
    """A stream that stands at the beginning of a chunk."""

    def __init__(self, reader: HubReader, number: int) -> None:
        self.reader, self.number = reader, number
        self._texts = iter(reader)

    @property
    def state(self) -> dict[str, Any] | None:
        """Where the stream stands, if that can be kept."""
        return self.reader.state

    def take(self) -> tuple[list[str], str, bool]:
        """The texts of the next chunk, their SHA-256, and whether the stream ends with them."""
        limit = _FIRST_CHUNK << min(self.number // 16, 5)
        texts, size, digest = [], 0, hashlib.sha256()
        while size < limit:
            text = next(self._texts, None)
            if text is None:
                break
            data = text.encode("utf-8", errors="replace")
            digest.update(len(data).to_bytes(8, "little") + data)
            size += len(data) + 1
            texts.append(text)
        self.number += 1
        return texts, digest.hexdigest(), size < limit


def _signed(entry: Content) -> str:
    return json.dumps({**entry, "sha256": _checksum(entry)})


def _checksum(entry: Content) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
