"""Tokenises texts into shards with several processes; can be killed and started again.

The texts are read twice. First to place each document in a split and in a chunk, which depends on
the texts alone; then to tokenise chunk after chunk, each by one process into at most one file per
split. So neither the number of processes nor an interruption changes a byte. A journal names the
finished chunks until the manifest takes its place.
"""

import array
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.corpus import SPLITS, encode_documents, split_documents, split_limit
from memlm.data.hashing import text_fraction
from memlm.data.shard_manifest import (
    Content,
    describe_files,
    make_identity,
    require_same,
    write_manifest,
    write_whole,
)
from memlm.data.text_origin import TextOrigin
from memlm.errors import UserError
from memlm.files import file_hash

JOURNAL_FILE = "unfinished.jsonl"

_CHUNKS = 256  # about so many chunks, within the sizes below
_LEAST_CHUNK, _LARGEST_CHUNK = 1 << 20, 1 << 26  # bytes of text
_SHARD_FILE = re.compile(r"(train|validation)-\d{6,}\.safetensors(\.partial)?")


@dataclass(frozen=True)
class Survey:
    """The first reading: `places` in the split and `sizes` (bytes) of the documents, SHA-256."""

    places: np.ndarray
    sizes: np.ndarray
    sha256: str

    @property
    def chunk_bytes(self) -> int:
        """Bytes of text after which a new chunk begins."""
        return min(max(int(self.sizes.sum()) // _CHUNKS, _LEAST_CHUNK), _LARGEST_CHUNK)

    def description(self, origin: TextOrigin) -> Content:
        """The texts as a manifest describes them where no files do."""
        return {
            "description": origin.description,
            "documents": len(self.sizes),
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, by split."""

    number: int
    texts: dict[str, list[str]]

    def __len__(self) -> int:
        return sum(map(len, self.texts.values()))


def survey_texts(texts: Iterable[str]) -> Survey:
    """Read all texts once; raises UserError for what cannot be read."""
    digest = hashlib.sha256()
    # Not lists: 16 bytes a document, however many there are.
    places, sizes = array.array("d"), array.array("q")
    for text in texts:
        data = text.encode("utf-8", errors="replace")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        places.append(text_fraction(text))
        sizes.append(len(data))
    return Survey(np.asarray(places), np.asarray(sizes), digest.hexdigest())


def write_shards(
    folder: Path,
    origin: TextOrigin,
    tokenizer: PreTrainedTokenizerBase,
    fraction: float,
    processes: int,
) -> None:
    """Tokenise the texts of `origin` into `folder`, or finish what an earlier call began.

    The caller holds the folder's lock. A bar on a terminal shows documents and tokens per second.

    Raises:
        UserError: for texts that cannot be read or change meanwhile, a folder that cannot be
            written or holds the beginning of something else, or a worker that died.
    """
    files = None if origin.files() is None else describe_files(origin)
    survey = survey_texts(origin.documents())
    if not len(survey.sizes):
        raise UserError(f"data: the source {origin.description} holds no text")
    source = files or survey.description(origin)
    if (prepared := origin.prepared()) is not None:
        source["prepared"] = prepared
    identity = make_identity(tokenizer, fraction, source, survey.chunk_bytes)
    done = _start(folder, identity)
    chunks = cut_chunks(origin, survey, fraction)
    with (
        (folder / JOURNAL_FILE).open("a", encoding="utf-8") as journal,
        _Progress(len(survey.sizes), folder.name) as progress,
    ):
        waiting = progress.skip(chunks, done)
        # Closed whatever happens: no worker writes once the lock is gone.
        with contextlib.closing(_tokenise(folder, waiting, tokenizer, processes)) as entries:
            for entry, documents in entries:
                done[entry["chunk"]] = entry
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                progress.add(entry, documents)
    splits = {}
    for split in SPLITS:
        shards = [done[number][split] for number in sorted(done) if done[number][split]]
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
        splits[split] = {**totals, "shards": shards}
    write_manifest(folder, {**identity, "splits": splits})
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what a build leaves that died behind its manifest; the caller holds the lock."""
    (folder / JOURNAL_FILE).unlink(missing_ok=True)


def cut_chunks(origin: TextOrigin, survey: Survey, fraction: float) -> Iterator[Chunk]:
    """The documents in their order, cut where the survey says.

    Raises UserError when the texts are no longer those of the survey.
    """
    texts = _same_texts(origin, survey)
    if len(survey.places) == 1:
        (text,) = texts
        parts = SPLITS if fraction else SPLITS[:1]
        yield Chunk(0, {split: split_documents([text], split, fraction) for split in parts})
        return
    limit = split_limit(survey.places.min(), survey.places.max(), fraction) if fraction else 0.0
    before = np.cumsum(survey.sizes) - survey.sizes
    numbers = np.unique(before // survey.chunk_bytes, return_inverse=True)[1]
    chunk = Chunk(0, {split: [] for split in SPLITS})
    for text, number, place in zip(texts, numbers, survey.places, strict=True):
        if number != chunk.number:
            yield chunk
            chunk = Chunk(int(number), {split: [] for split in SPLITS})
        chunk.texts["validation" if place < limit else "train"].append(text)
    yield chunk


def _same_texts(origin: TextOrigin, survey: Survey) -> Iterator[str]:
    """The texts again, each as it was in the survey."""
    changed = UserError(f"data: the texts of {origin.description} changed while they were read")
    count = 0
    for text in origin.documents():
        if count == len(survey.places) or text_fraction(text) != survey.places[count]:
            raise changed
        count += 1
        yield text
    if count != len(survey.places):
        raise changed


def _start(folder: Path, identity: Content) -> dict[int, Content]:
    """Begin or continue the journal; returns the entries of the finished chunks by number."""
    path = folder / JOURNAL_FILE
    shards = [path for path in folder.iterdir() if _SHARD_FILE.fullmatch(path.name)]
    first = json.dumps(identity)
    if not path.exists():
        if shards:
            raise UserError(
                f"{folder}: holds {shards[0].name} but no manifest, so nobody knows what it is; "
                "choose another data.shards, or delete this folder to tokenise anew"
            )
        write_whole(path, f"{first}\n".encode())
        return {}
    entries = _read_lines(path)
    require_same(folder, entries[0] if entries else {}, identity)
    done = {entry["chunk"]: entry for entry in entries[1:] if _is_whole(folder, entry)}
    for shard in shards:
        if shard.suffix == ".partial":
            shard.unlink()
    # Written anew: a line that was cut short would swallow the next one.
    lines = [first, *(json.dumps(done[number]) for number in sorted(done))]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return done


def _read_lines(path: Path) -> list[Content]:
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _is_whole(folder: Path, entry: Content) -> bool:
    for split in SPLITS:
        shard = entry[split]
        if shard is None:
            continue
        path = folder / shard["file"]
        if not path.is_file() or file_hash(path) != shard["sha256"]:
            return False
    return True


def _tokenise(
    folder: Path, chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, processes: int
) -> Generator[tuple[Content, int], None, None]:
    """Entries of the chunks as they are finished, in whatever order, and their documents."""
    if processes == 1:
        for chunk in chunks:
            yield write_chunk(folder, chunk, tokenizer), len(chunk)
        return
    # Forking starts at once; its workers touch neither torch nor a GPU. Elsewhere it is not safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    executor = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(folder, tokenizer),
    )
    running: dict[Future, int] = {}
    try:
        while True:
            # Twice as many chunks as workers: none waits for the next text.
            while len(running) < 2 * processes and (chunk := next(chunks, None)) is not None:
                running[executor.submit(_work, chunk)] = len(chunk)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield future.result(), running.pop(future)
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a tokenising process was killed (is there too little memory?); start "
            "again to go on, perhaps with fewer data.tokenize_processes"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_worker: tuple[Path, PreTrainedTokenizerBase] | None = None  # of this process


def _start_worker(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker
    _worker = (folder, tokenizer)
    # Processes share the cores already, and threads of the library do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Otherwise a worker whose parent was killed waits forever, with the folder's lock."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Content:
    assert _worker is not None
    folder, tokenizer = _worker
    return write_chunk(folder, chunk, tokenizer)


def write_chunk(folder: Path, chunk: Chunk, tokenizer: PreTrainedTokenizerBase) -> Content:
    """Tokenise a chunk into its files; returns its line of the journal."""
    entry: Content = {"chunk": chunk.number, **dict.fromkeys(SPLITS)}
    for split, texts in chunk.texts.items():
        documents = list(encode_documents(texts, tokenizer))
        if not documents:
            continue
        lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents)
        data = save({"tokens": tokens, "lengths": lengths})
        path = folder / f"{split}-{chunk.number:06d}.safetensors"
        try:
            write_whole(path, data)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); what is finished stays, start "
                "again to go on"
            ) from error
        entry[split] = {
            "file": path.name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "documents": len(lengths),
            "tokens": len(tokens),
        }
    return entry


class _Progress(contextlib.AbstractContextManager):
    """A bar of documents with tokens per second; silent where stderr is no terminal."""

    def __init__(self, documents: int, name: str):
        label = f"tokenising {name}"
        self._bar = tqdm(total=documents, desc=label, unit=" documents", disable=None)
        self._start = time.monotonic()
        self._tokens = 0

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, chunks: Iterable[Chunk], done: dict[int, Content]) -> Iterator[Chunk]:
        """The chunks that are not done; the others count as shown."""
        for chunk in chunks:
            if chunk.number in done:
                self._bar.update(len(chunk))
            else:
                yield chunk

    def add(self, entry: Content, documents: int) -> None:
        """Show a finished chunk."""
        self._tokens += sum(entry[split]["tokens"] for split in SPLITS if entry[split])
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(documents)
