"""Files and folders that are there whole or not at all, whenever a program is killed."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from memlm.errors import UserError

_PARTIAL, _OLD, _REMOVED = ".partial", ".old", ".removed"


def write_folder(
    target: Path, write: Callable[[Path], None], then: str = "go on with --resume"
) -> None:
    """Fill a new folder with `write` and put it in the place of `target`.

    A kill at any moment leaves the old folder, the new one, or (where the old one had just been
    put aside) what `recover` makes the old one from.

    Args:
        target: the folder.
        write: writes the files into the folder that it is given.
        then: what the user can do once the disk is mended.

    Raises:
        UserError: when the disk is full or refuses; the old folder stays, nothing else is left.
    """
    temporary, old = _beside(target, _PARTIAL), _beside(target, _OLD)
    with disk_errors(target, then):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target.parent, target.name)
        try:
            temporary.mkdir()
            write(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            sync(target.parent)
            sync(target.parent.parent)
        except Exception:
            recover(target.parent, target.name)
            raise
        shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder; a kill never leaves a part of it under its own name."""
    removed = _beside(folder, _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    with disk_errors(folder):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def recover(parent: Path, name: str = "*") -> None:
    """Clean up after a killed writer of parent/name, which may be a pattern."""
    for old in parent.glob(f".{name}{_OLD}"):
        target = parent / old.name[1 : -len(_OLD)]
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for suffix in (_PARTIAL, _REMOVED):
        for leftover in parent.glob(f".{name}{suffix}"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole, text as UTF-8; a kill leaves the old one or the new one.

    Raises:
        UserError: when the disk is full or refuses; the old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    write_file(path, lambda new: new.write_bytes(data), make_folder=False)


def write_file(
    path: Path,
    write: Callable[[Path], object],
    make_folder: bool = True,
    then: str = "go on with --resume",
) -> None:
    """Let `write` fill a new file and put it in the place of `path`, as `replace_file` does.

    Args:
        path: the file.
        write: is given the name to write under.
        make_folder: whether a folder that is missing is made.
        then: what the user can do once the disk is mended.

    Raises:
        UserError: when the disk is full or refuses; the old file stays.
    """
    temporary = _beside(path, _PARTIAL)
    with disk_errors(path, then):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            sync(temporary)
        except Exception:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)
        sync(path.parent)


def append_line(path: Path, text: str) -> None:
    """Add a line to a file.

    Raises:
        UserError: when the disk is full or refuses; no part of the line stays.
    """
    with disk_errors(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        line = memoryview(f"{text}\n".encode())
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


def try_lock(path: Path) -> FileLock | None:
    """The lock of a file, until it is released or the process ends in whatever way.

    The file is made where it is missing, and its folder; it stays when the lock is released.

    Returns:
        None while another holds the lock.

    Raises:
        OSError: where the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(target: Path, then: str = "go on with --resume") -> Iterator[None]:
    """Turn a disk that is full or refuses into a UserError that names `target`.

    Libraries written in Rust (safetensors, tokenizers) have their own exceptions, which end in
    the operating system's number.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            reason = os.strerror(int(number[1]))
        if reason is None:
            raise
        raise UserError(
            f"{target}: could not be written ({reason}); what was saved before is whole: make "
            f"room or mend the disk, then {then}"
        ) from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")
