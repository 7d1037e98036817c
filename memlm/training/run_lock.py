"""One training at a time in a run folder."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Self

from accelerate import Accelerator
from filelock import FileLock

from memlm.errors import UserError
from memlm.files import try_lock
from memlm.training.together import on_main

LOCK_FILE = ".lock"


class RunLock:
    """Holds a run folder while it is entered; collective.

    The main process holds the lock for all. It ends with that process, so a killed run leaves
    nothing that is in the way. Its file, and folders that were made for it alone, go with it.

    Args:
        folder: the run folder; it may not exist yet.
        accelerator: the processes of the run.

    Raises:
        UserError: on entering, on every process: when another training holds the folder, or it
            cannot be written.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.path, self.accelerator = folder / LOCK_FILE, accelerator
        self._lock: FileLock | None = None
        self._made: list[Path] = []  # innermost first

    def __enter__(self) -> Self:
        on_main(self.accelerator, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # While it is held: a lock that is taken on a removed file does not count.
            self.path.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> None:
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"{folder}: the run folder is a file; choose another with --train.output_dir"
            )
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            self._lock = try_lock(self.path)
            if self._lock is not None:
                self.path.write_text(
                    f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8"
                )
        except OSError as error:
            self.__exit__()
            raise UserError(
                f"{folder}: the run folder cannot be written ({error.strerror}); choose another "
                "with --train.output_dir"
            ) from error
        if self._lock is None:
            raise UserError(
                f"{folder}: another training is at work here ({_holder(self.path)}); wait for its "
                "end, or choose another folder with --train.output_dir"
            )


def _holder(path: Path) -> str:
    """Who wrote the lock file."""
    try:
        return path.read_text(encoding="utf-8").strip() or "process unknown"
    except (OSError, UnicodeDecodeError):
        return "process unknown"
