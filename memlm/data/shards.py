"""Tokenised texts on disk, read through memory maps: `data.shards` of a run config."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.corpus import Corpus
from memlm.data.shard_manifest import (
    MANIFEST_FILE,
    Content,
    describe_files,
    make_identity,
    read_manifest,
    require_same,
)
from memlm.data.shard_writer import JOURNAL_FILE, clean, survey_texts, write_shards
from memlm.data.text_origin import TextOrigin
from memlm.errors import UserError
from memlm.files import file_hash

_LOCK_FILE = ".lock"
_PATIENCE = 5.0  # seconds of waiting for another process before a word about it
_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}  # safetensors' names
_logger = logging.getLogger(__name__)


class ShardedTokens:
    """Token arrays of several files as one 1-D array, read only: `len` and slices of step 1.

    A slice within a file is a view of its memory map, one across files a copy. `np.asarray` reads
    all of it into memory.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._edges = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return self._parts[0].dtype

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of sharded tokens have step 1, got {step}")
        number = int(np.searchsorted(self._edges, start, side="right")) - 1
        pieces = []
        while start < stop:
            first, last = int(self._edges[number]), int(self._edges[number + 1])
            pieces.append(self._parts[number][start - first : stop - first])
            start, number = last, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


def prepare_shards(
    root: str | Path,
    origin: TextOrigin,
    tokenizer: PreTrainedTokenizerBase,
    fraction: float,
    processes: int = 1,
) -> Path:
    """The folder below `root` with the shards of `origin`, which are made first where missing.

    Of several processes that ask at once, one makes them and the others wait.

    Args:
        root: folder of the shards of any number of sources.
        origin: the texts.
        tokenizer: tokenises them.
        fraction: `validation_fraction` of the data section.
        processes: tokenise, where shards are missing.

    Raises:
        UserError: for shards of another version, tokenizer, source or fraction, for texts that
            cannot be read and folders that cannot be written.
    """
    folder = Path(root).expanduser() / origin.name
    manifest, journal = folder / MANIFEST_FILE, folder / JOURNAL_FILE
    if not manifest.exists() or journal.exists():
        origin.files()  # a missing file is found before a folder is made
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                if manifest.exists():
                    clean(folder)
                else:
                    write_shards(folder, origin, tokenizer, fraction, processes)
        except OSError as error:
            raise UserError(
                f"data.shards: {folder} cannot be written ({error.strerror})"
            ) from error
    found = read_manifest(folder)
    source = _describe(origin, found["source"], manifest.stat().st_mtime_ns)
    wanted = make_identity(tokenizer, fraction, source, found["chunk_bytes"])
    require_same(folder, found, wanted)
    return folder


def _describe(origin: TextOrigin, known: Content, since: int) -> Content:
    """The texts of `origin` now, compared with what is known by reading as few as possible."""
    if origin.files() is not None:
        return describe_files(origin, known, since)
    prepared = known.get("prepared")
    if prepared is not None and prepared == origin.prepared():
        return {**known, "description": origin.description}
    source = survey_texts(origin.documents()).description(origin)
    return source if prepared is None else {**source, "prepared": prepared}


def read_shards(folder: Path, split: str) -> Corpus:
    """One split of finished shards, memory-mapped, after every byte of it was verified.

    Processes that one launcher started on this machine share the work: each computes the SHA-256
    of a part of the files, and whoever finds damage stops the run.

    Raises:
        UserError: for a missing, truncated or altered file, and for a split without tokens.
    """
    entries = read_manifest(folder)["splits"][split]["shards"]
    if not entries:
        raise UserError(f"data: the {split} split holds no text")
    verify(folder, entries, *local_share())
    maps = [map_tensors(folder / entry["file"]) for entry in entries]
    lengths = np.concatenate([found["lengths"] for found in maps])
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return Corpus(ShardedTokens([found["tokens"] for found in maps]), starts)


def local_share() -> tuple[int, int]:
    """This process among those that the launcher started on this machine, and their number."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def verify(folder: Path, entries: Sequence[Content], part: int = 0, parts: int = 1) -> None:
    """Compare files with their entries: the sizes of all, the SHA-256 of one `part` of `parts`.

    A thread per core, about 1 GB a second each where the disk keeps up; that also brings the files
    into the system's cache.

    Raises:
        UserError: for a missing, truncated or altered file.
    """
    for entry in entries:
        _check_size(folder, entry)
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        # The first error in the order of the files, so that it is always the same one.
        for _ in executor.map(lambda entry: _check_content(folder, entry), entries[part::parts]):
            pass


def locked(folder: Path) -> AcquireReturnProxy:
    """Hold a folder alone until the end of a `with`; a word to the user when that takes long."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        return lock.acquire(timeout=_PATIENCE)
    except Timeout:
        _logger.warning("%s: waiting for another process that tokenises into it", folder)
        return lock.acquire()


def _check_size(folder: Path, entry: Content) -> None:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing, though the manifest names it; {_ADVICE}") from error
    if size != entry["bytes"]:
        raise UserError(
            f"{path}: {size} bytes long instead of {entry['bytes']}, truncated or altered; "
            f"{_ADVICE}"
        )


def _check_content(folder: Path, entry: Content) -> None:
    path = folder / entry["file"]
    try:
        found = file_hash(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_ADVICE}") from error
    if found != entry["sha256"]:
        raise UserError(f"{path}: altered since it was written (SHA-256 differs); {_ADVICE}")


_ADVICE = "delete its folder to tokenise anew"


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only memory maps."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=0).view(np.ndarray)
    tensors = {}
    for name in ("tokens", "lengths"):
        begin, end = (8 + size + edge for edge in header[name]["data_offsets"])
        tensors[name] = whole[begin:end].view(_DTYPES[header[name]["dtype"]])
    return tensors
