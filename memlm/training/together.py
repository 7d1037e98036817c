"""What one process does for all, or each for itself, and all of them learn how it went."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from memlm.errors import SharedError, UserError

T = TypeVar("T")


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """A UserError in it is one that every process raises by itself."""
    try:
        yield
    except UserError as error:
        raise SharedError(str(error)) from error


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process; collective.

    Returns:
        Its result, on every process; small, since it is broadcast.

    Raises:
        SharedError: on every process, where `function` raised a UserError: none is left waiting.
            After another error, which the main process raises, on the others.
    """
    if accelerator.num_processes == 1:
        return function()
    outcome, failure = [None, None], None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            failure, outcome[1] = error, _message(error)
    broadcast_object_list(outcome)
    _raise(failure, outcome[1])
    return outcome[0]


def on_each(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function`, which makes no collective call itself, on every process; collective.

    Returns:
        This process's result.

    Raises:
        SharedError: on every process, where `function` raised a UserError on any: the first one's.
            After another error, which the process that had it raises, on the others.
    """
    if accelerator.num_processes == 1:
        return function()
    result, failure, message = None, None, None
    try:
        result = function()
    except Exception as error:
        failure, message = error, _message(error)
    messages = [one for one in gather_object([message]) if one is not None]
    _raise(failure, messages[0] if messages else None)
    return result


def _message(error: Exception) -> str:
    """What all processes are told of an error of one."""
    if isinstance(error, UserError):
        return str(error)
    return f"another process failed ({type(error).__name__}: {error})"


def _raise(failure: Exception | None, message: str | None) -> None:
    """Raise what this process has to, if any process failed; one's own bugs keep their traceback.

    Args:
        failure: what went wrong here.
        message: what all were told.
    """
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    if message is not None:
        raise SharedError(message)
