"""The processes of one evaluation under `accelerate launch`; one process otherwise."""

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from memlm.errors import UserError
from memlm.gloo import hold_gloo

T = TypeVar("T")

# One process may read a context of millions of tokens while the others have nothing left to do.
_PATIENCE = datetime.timedelta(days=7)


class Alone:
    """One process that does everything.

    Attributes:
        number: of this process.
        main: whether it writes the results.
    """

    number = 0
    main = True

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part."""
        return list(work)

    def wait(self) -> None:
        """Until all processes are here."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, on all of them."""
        return [value]


class Processes(Alone):
    """Processes that divide the work; each holds the whole models."""

    def __init__(self):
        """Find the others.

        Raises:
            UserError: when not all processes that the launcher was asked for take part.
        """
        patience = InitProcessGroupKwargs(timeout=_PATIENCE)
        self.state = Accelerator(kwargs_handlers=[patience])
        hold_gloo()
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.state.num_processes:
            raise UserError(
                f"asked for {asked} processes but {self.state.num_processes} take part; on a CPU: "
                "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ..."
            )
        self.number = self.state.process_index
        self.main = self.state.is_main_process

    @property
    def device(self):
        """Where this process puts its models."""
        return self.state.device

    def share(self, work: Sequence[T]) -> list[T]:
        # Long and short batches are spread over the processes.
        return list(work[self.number :: self.state.num_processes])

    def wait(self) -> None:
        self.state.wait_for_everyone()

    def gather(self, value: T) -> list[T]:
        return gather_object([value])
