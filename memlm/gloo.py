"""The end of gloo's threads, before the interpreter shuts down."""

import gc

from torch import distributed

# A thread of gloo may still have to release a tensor of the last collective call, for which it
# waits for Python's lock (torch 2.13). While the interpreter shuts down that aborts the process;
# when DDP's reducer has the last reference to the group and joins the threads, with the lock in
# its hands, it waits for ever. A reference of Python's own lets go of the lock.
_held: list[distributed.ProcessGroup] = []


def hold_gloo() -> None:
    """Keep the process group, if it is gloo's, until `stop_gloo`."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        _held.append(distributed.group.WORLD)


def stop_gloo() -> None:
    """End the threads of what was held, once nothing else refers to it."""
    if not _held:
        return
    if distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()  # models under DDP hold the group, in cycles
    _held.clear()
