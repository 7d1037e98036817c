"""The manifest of a checkpoint: size and SHA-256 of every file, written last."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from memlm.errors import UserError
from memlm.files import file_hash, sync

MANIFEST_FILE = "manifest.json"


Entries = dict[str, dict[str, int | str]]


def file_entries(folder: Path, paths: Iterable[Path]) -> Entries:
    """Size and hash, by its name in the folder, of each file; all of them are on disk then."""
    entries: Entries = {}
    for path in sorted(paths):
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": file_hash(path),
        }
    return entries


def write_manifest(folder: Path, known: Entries | None = None) -> None:
    """Write the manifest of a folder's files; all of them are on disk before it is.

    Args:
        folder: complete.
        known: entries of files that were read already, by other processes for instance.
    """
    files = dict(known or {})
    there = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files |= file_entries(
        folder, [path for path in there if path.relative_to(folder).as_posix() not in files]
    )
    path = folder / MANIFEST_FILE
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"files": files}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_manifest(folder: Path) -> None:
    """Compare a folder with its manifest.

    Files that the manifest does not know are no fault: a user may have added them.

    Raises:
        UserError: naming the first file that is missing, of another size or with other content.
    """
    for name, entry in _read(folder).items():
        path = folder / name
        try:
            size, wanted = path.stat().st_size, entry["size"]
            if size != wanted:
                raise UserError(f"{path}: damaged: {size} bytes where {wanted} were written")
            if file_hash(path) != entry["sha256"]:
                raise UserError(f"{path}: damaged: its content changed after it was written")
        except FileNotFoundError as error:
            raise UserError(f"{path}: missing, but it was part of the checkpoint") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read(folder: Path) -> Entries:
    path = folder / MANIFEST_FILE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if all({"size", "sha256"} == entry.keys() for entry in files.values()) and files:
            return files
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing: without its checksums the checkpoint is not read"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged: it is no list of files") from error
    raise UserError(f"{path}: damaged: it is no list of files")
