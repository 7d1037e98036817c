"""What one process does for all, and all of them learn how it went."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from memlm.errors import UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process; collective.

    Returns:
        Its result, on every process; small, since it is broadcast.

    Raises:
        UserError: on every process, where `function` raised one: none is left waiting.
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
        raise UserError(outcome[1])
    return outcome[0]
