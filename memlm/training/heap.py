"""The memory that the tensors of a step leave to the next one."""

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_ names of glibc's mallopt
_LARGEST = 32 << 20  # bytes; the most that glibc itself comes to serve from the heap
_KEPT = 1 << 30  # bytes
_USERS_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 1 GiB, for the rest of the process.

    It would give memory back to the system after a step and ask for it again in the next, a fault
    for every page of 4 KiB: 3 to 5 % of a step of a model with 3.5 million parameters. Does nothing
    where another allocator is at work or the environment has settings of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(os.environ.get(name) for name in _USERS_CHOICE):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEPT)
