"""What an evaluation costs: tokens, seconds, bytes of state, peak memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch


class ProgressBar(Protocol):
    """The part of tqdm that is used."""

    def update(self, tokens: int) -> Any:
        """Advance by a number of tokens."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the states of one row: of its memories, of attention's keys and values, of all."""

    memory: int
    key_values: int
    total: int


@dataclass
class Meter:
    """Tokens and seconds by what they were spent on, the largest states, and the bar.

    Attributes:
        bar: moved by `advance`.
        device: of the model; what a GPU was told to do is waited for, so that it counts where it
            belongs.
        tokens, seconds: by kind: "read", "generate", "answer", "score".
        state_bytes: of the largest states of a row that were seen.
    """

    bar: ProgressBar | None = None
    device: torch.device | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    state_bytes: StateBytes = StateBytes(0, 0, 0)

    def advance(self, tokens: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(tokens)

    @contextmanager
    def measure(self, kind: str, tokens: int) -> Iterator[None]:
        """Count `tokens` and the time spent inside as `kind`."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.tokens[kind] = self.tokens.get(kind, 0) + tokens
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def saw(self, found: StateBytes) -> None:
        """Keep the largest states."""
        if found.total > self.state_bytes.total:
            self.state_bytes = found

    def costs(self) -> dict[str, Any]:
        """What the ledger keeps of a batch."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "memory_state_bytes": self.state_bytes.memory,
            "key_value_bytes": self.state_bytes.key_values,
            "state_bytes": self.state_bytes.total,
        }


class PeakMemory:
    """The most memory in use since it was made: of the GPU, else of this process.

    On a CPU it is the resident memory, which Linux keeps the peak of; elsewhere nothing is
    measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # Resets the peak of the resident memory (proc(5), clear_refs).
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """The peak; None where it cannot be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
