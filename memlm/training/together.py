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
    """
    if accelerator.num_processes == 1:
        return function()
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SharedError(outcome[1])
    return outcome[0]


def on_each(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function`, which makes no collective call itself, on every process; collective.

    Returns:
        This process's result.

    Raises:
        SharedError: on every process, where `function` raised a UserError on any: the first one's.
    """
    if accelerator.num_processes == 1:
        return function()
    result, message = None, None
    try:
        result = function()
    except UserError as error:
        message = str(error)
    messages = [one for one in gather_object([message]) if one is not None]
    if messages:
        raise SharedError(messages[0])
    return result
