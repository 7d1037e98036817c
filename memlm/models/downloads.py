"""Whether the files of a checkpoint came down from the Hub as they are there.

huggingface_hub compares sizes only. A file in its cache is called by its hash: the SHA-256 of
weights, git's hash of small files. So the content can be compared with the name. A file is read for
this once, after its download: a mark beside it in the cache remembers that.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from memlm.errors import UserError
from memlm.files import file_hash

CONFIG_NAME = "config.json"
_MARKS = ".memlm_checked"
_SUFFIXES = (".json", ".safetensors", ".bin")


def check_downloads(source: str, options: dict[str, Any]) -> None:
    """Compare the cached files of a model with their hashes; damaged ones are deleted.

    Args:
        source: the id of a repository; nothing is checked for a local folder.
        options: of `from_pretrained`: cache_dir, revision and subfolder are read.

    Raises:
        UserError: naming a file whose content is not what the Hub has.
    """
    if Path(source).is_dir():
        return
    for path in _cached_files(source, options):
        # One link only: behind it may be a store of xet, where files are called by another hash.
        blob = path.parent / path.readlink()
        marks = blob.parent.parent / _MARKS
        mark = marks / blob.name
        if mark.exists() and mark.stat().st_mtime_ns >= blob.stat().st_mtime_ns:
            continue
        if not _is_whole(blob):
            then = "it was deleted: load again to fetch it anew"
            try:
                path.unlink()
                blob.unlink()
            except OSError as error:
                then = f"delete {blob} and load again ({error.strerror})"
            raise UserError(
                f"{source}: {path.name} was damaged on its way from the Hub (its hash is not the "
                f"one that the Hub has for it); {then}"
            )
        try:
            marks.mkdir(exist_ok=True)
            mark.touch()
        except OSError:  # a cache that is read only: the file is compared again next time
            continue


def _cached_files(source: str, options: dict[str, Any]) -> Iterator[Path]:
    """The files of the cached revision that a load reads, where they are called by their hash."""
    subfolder = options.get("subfolder") or ""
    try:
        found = try_to_load_from_cache(
            source,
            f"{subfolder}/{CONFIG_NAME}".lstrip("/"),
            cache_dir=options.get("cache_dir"),
            revision=options.get("revision"),
        )
    except HFValidationError:  # no id: transformers says so
        return
    if isinstance(found, str):
        for path in sorted(Path(found).parent.glob("*")):
            # Where the file system has no links, copies lie under their own names.
            if path.suffix in _SUFFIXES and path.is_symlink() and path.exists():
                yield path


def _is_whole(blob: Path) -> bool:
    """Whether a file of the cache has the content that its name stands for."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_hash(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        # Mirrors may call a file by its own SHA-1 instead of git's.
        hashes = (hashlib.sha1(head + content) for head in (b"blob %d\0" % len(content), b""))
        return blob.name in (digest.hexdigest() for digest in hashes)
    return True
