"""Folders of tensors whose changes take effect at once: shards and a manifest that names them.

A shard is written under a name that no manifest has named before, and is on disk before a manifest
names it. The manifest is replaced by a rename: that is the moment of the change. Shards that are no
longer named are removed after it. So whenever a writer dies, what the folder holds is what the
latest manifest names, complete.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlm.errors import UserError
from memlm.files import file_hash, sync, try_lock

MANIFEST_FILE = "manifest.json"
FORMAT = "memlm store"
SCHEMA = 1
SHARD_BYTES = 1 << 30  # the usual size of a shard

_SHARD_FILE = re.compile(r"shard-\d{6,}\.safetensors(\.partial)?")
_INDEX_FOLDER = re.compile(r"index-\d{6,}")
_LOCK_FILE = ".lock"
Content = dict[str, Any]
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Shard:
    """A file of a store: its name, bytes and SHA-256, and how many entries it holds."""

    file: str
    bytes: int
    sha256: str
    entries: int


def read_manifest(folder: Path, kind: str) -> Content:
    """What the manifest of a store of class `kind` says.

    Raises:
        UserError: for a folder that is no store, or one of another class or schema, or whose
            manifest was altered.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such store")
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a store (it has no {MANIFEST_FILE})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not the manifest of a store") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not the manifest of a store")
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{folder}: written with schema {content.get('schema')!r}; this version of memlm reads "
            f"schema {SCHEMA}"
        )
    if content.pop("sha256", None) != _checksum(content):
        raise UserError(f"{path}: altered since it was written (its SHA-256 differs)")
    if content["class"] != kind:
        raise UserError(f"{folder}: holds a {content['class']}, not a {kind}")
    return content


def previous_content(folder: Path, kind: str) -> Content | None:
    """What a store that is about to be replaced says; None where there is none.

    Raises:
        UserError: for a manifest that is not that of a store of class `kind`: it is kept.
    """
    return read_manifest(folder, kind) if (folder / MANIFEST_FILE).exists() else None


def commit(folder: Path, kind: str, content: Content) -> None:
    """Make `content` what the store is, and remove the shards and indices that it does not name.

    Args:
        folder: of the store.
        kind: class of the store.
        content: of the manifest, with `shards`: each a Shard as a dictionary; and `index`, where
            there is one: with its `folder`.
    """
    # The checksum is that of what JSON makes of it, such as names of numbers.
    content = json.loads(json.dumps({"format": FORMAT, "schema": SCHEMA, "class": kind, **content}))
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=1)
    temporary = folder / f"{MANIFEST_FILE}.partial"
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(folder / MANIFEST_FILE)
    sync(folder)
    named = {shard["file"] for shard in content["shards"]}
    named.add((content.get("index") or {}).get("folder"))
    for path in sorted(folder.iterdir()):
        if path.name in named:
            continue
        if _SHARD_FILE.fullmatch(path.name) or (
            _INDEX_FOLDER.fullmatch(path.name) and path.is_symlink()  # to another disk
        ):
            path.unlink()
        elif _INDEX_FOLDER.fullmatch(path.name):
            shutil.rmtree(path)


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor], entries: int) -> Shard:
    """Write shard `number` of a store; nothing names it yet.

    Args:
        folder: of the store.
        number: one that no manifest of this folder has named.
        tensors: contiguous, on the CPU.
        entries: how many the shard holds.
    """
    path = folder / f"shard-{number:06d}.safetensors"
    temporary = path.with_name(f"{path.name}.partial")
    save_file(tensors, temporary)
    sync(temporary)
    temporary.replace(path)
    sync(folder)
    return Shard(path.name, path.stat().st_size, file_hash(path), entries)


def index_folder(number: int) -> str:
    """The name of an index within a store; `number` as for a shard."""
    return f"index-{number:06d}"


def read_shard(folder: Path, shard: Shard, verify: bool) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped: their pages are read when they are used.

    Processes that map the same shard share its pages. Writing to such a tensor changes a private
    copy of the page, never the file.

    Args:
        folder: of the store.
        shard: as the manifest names it.
        verify: read the whole file now and compare its SHA-256.

    Raises:
        UserError: for a file that is missing, of another size, or altered.
    """
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing, though the manifest names it") from error
    if size != shard.bytes:
        raise UserError(f"{path}: {size} bytes long instead of {shard.bytes}; truncated or altered")
    if verify and file_hash(path) != shard.sha256:
        raise UserError(f"{path}: altered since it was written (its SHA-256 differs)")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps with a RuntimeError
        raise UserError(f"{path}: altered since it was written (no safetensors file)") from error


def shards_of(content: Content) -> list[Shard]:
    """The shards that a manifest names, in order."""
    return [Shard(**shard) for shard in content["shards"]]


def as_content(shards: list[Shard]) -> list[Content]:
    """Shards as a manifest names them."""
    return [asdict(shard) for shard in shards]


def load_current(folder: Path, kind: str, load: Callable[[Content], Loaded]) -> Loaded:
    """`load(content)` of the manifest as it stands, whatever a writer does meanwhile."""
    while True:
        content = read_manifest(folder, kind)
        try:
            return load(content)
        except UserError:
            # A writer may have removed shards between the manifest and their reading.
            if read_manifest(folder, kind) == content:
                raise


def lock_for_writing(folder: Path) -> FileLock:
    """The right to write into a store, until it is released or the process ends in whatever way.

    The folder is made if it is missing.

    Raises:
        UserError: while another writer holds it, or where no folder can be made or written.
    """
    try:
        lock = try_lock(folder / _LOCK_FILE)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    if lock is None:
        raise UserError(f"{folder}: another writer has this store open")
    return lock


def _checksum(content: Content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
