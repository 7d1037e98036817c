"""SIGTERM and SIGINT end a run after its step, with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator

from memlm.training.loss import total

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A job system and a launcher both pass on one and the same request.
_SAME_REQUEST = 2.0


class Interruption:
    """Notes the first SIGTERM or SIGINT while it is entered; a later one ends the process at once.

    Signals within two seconds of the first are the same request. Outside the main thread, where
    Python takes no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._asked_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._note) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._asked_at = signal.Signals(number).name, time.monotonic()
            # Not print: the signal may have come in the middle of one.
            line = f"{self.name}: finishing the step and saving; once more to stop at once\n"
            os.write(2, line.encode())
        elif time.monotonic() - self._asked_at > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; collective, so that all stop after the same step."""
        asked = torch.tensor([float(self.name is not None)])
        return bool(total(asked, accelerator).item())
