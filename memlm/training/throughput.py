"""How fast a run goes: tokens per second, use of the device, where the time goes, time left."""

import dataclasses
import re
from collections import deque
from collections.abc import Sequence

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from memlm.config import TrainConfig

RECENT = 50  # steps whose mean time tells how long the others will take


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense peak of an accelerator by its data sheet in TFLOP/s, without structured sparsity.

    Attributes:
        name: a regular expression for the name that the device gives itself.
        bf16: matrix products of bfloat16 numbers, summed in float32.
        tf32: of float32 numbers that are rounded to TF32.
        fp32: of float32 numbers.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float


# The first that fits; parts and weaker relatives of a device are not in the table.
_OTHER = re.compile(r"\bMIG\b|Laptop|Max-Q|4090 D\b|5090 D\b")
PEAKS = [
    Peak(r"\bA100\b", 312, 156, 19.5),
    Peak(r"\bA40\b", 149.7, 74.8, 37.4),
    Peak(r"\bA10\b", 125, 62.5, 31.2),
    Peak(r"\bH100 PCIe", 756, 378, 51),
    Peak(r"\bH[12]00 NVL", 835, 417, 60),
    Peak(r"\b(H100|H200|GH200)\b", 989, 494, 67),
    Peak(r"\bGB200\b", 2500, 1250, 80),
    Peak(r"\bB200\b", 2250, 1125, 75),
    Peak(r"\bL40S\b", 362, 183, 91.6),
    Peak(r"\bL4\b", 121, 60, 30.3),
    Peak(r"RTX 3090$", 71, 35.6, 35.6),
    Peak(r"RTX 4090$", 165.2, 82.6, 82.6),
    Peak(r"RTX 5090$", 209.5, 104.8, 104.8),
    Peak(r"RTX A6000$", 154.8, 77.4, 38.7),
    Peak(r"\bMI300X\b", 1307.4, 653.7, 163.4),
]


def peak_flops(name: str, mixed_precision: str) -> float | None:
    """What a device can do at most, in FLOP/s; None for one that is not in the table.

    Args:
        name: as the device gives it.
        mixed_precision: `train.mixed_precision`; without, float32 products are TF32's where torch
            is told that they may.
    """
    if _OTHER.search(name):
        return None
    found = next((peak for peak in PEAKS if re.search(peak.name, name)), None)
    if found is None:
        return None
    if mixed_precision == "bf16":
        return found.bf16 * 1e12
    exact = torch.get_float32_matmul_precision() == "highest"
    return (found.fp32 if exact else found.tf32) * 1e12


def device_name(device: torch.device) -> str:
    """What a device calls itself; "cpu" for a CPU."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if device.type == "cpu" or named is None else named(device)


def training_flops(model: nn.Module, length: int) -> float:
    """Floating point operations that training on a token takes, in rows of `length` tokens.

    Those of the model, not of the device: what is computed twice to save memory counts once. The
    forward pass is what the parts of the model say of themselves: two per parameter that a token
    uses (of a value table, the rows that are read), and attention and searches as far as they
    look. The backward pass takes twice as many, without the gradients of frozen matrices. Together
    that is 6 N and attention.
    """
    frozen = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and not module.weight.requires_grad
    }
    return 3 * model.flops(length) / length - 2 * sum(frozen.values())


class Throughput:
    """The times of the steps of a run.

    Args:
        model: the model, without wrappers.
        options: how it is trained.
        accelerator: its processes; `report` is collective.
    """

    def __init__(self, model: nn.Module, options: TrainConfig, accelerator: Accelerator):
        self.model, self.options, self.accelerator = model, options, accelerator
        self.device = device_name(accelerator.device)
        self.peak = peak_flops(self.device, options.mixed_precision)
        self._flops: tuple[tuple[int, int | None], float] | None = None  # of a stage
        self._steps, self._seconds, self._data, self._log = 0, 0.0, 0.0, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._warm = False

    def step(self, seconds: float, data_seconds: float) -> None:
        """A step was done.

        Args:
            seconds: that it took.
            data_seconds: of these, waiting for rows.
        """
        self._steps += 1
        self._seconds += seconds
        self._data += data_seconds
        if self._warm:  # the first step compiles kernels and fills caches
            self._recent.append(seconds)
        self._warm = True

    def logged(self, seconds: float) -> None:
        """So much time went by while telling of a step."""
        self._seconds += seconds
        self._log += seconds
        if self._recent:
            self._recent[-1] += seconds

    def report(self, length: int, window: int | None, steps: int) -> dict[str, float | None]:
        """The record of the steps since the last report; see `memlm.training.logs`.

        Args:
            length, window: of the stage.
            steps: that are left.
        """
        count = max(1, self._steps)
        times = (self._seconds / count, self._data / count, self._log / count)
        self._steps, self._seconds, self._data, self._log = 0, 0.0, 0.0, 0.0
        # All processes take part in a step, so the slowest one's times are the step's.
        step, data, log, memory = _largest([*times, self._memory()], self.accelerator)
        speed = self.options.tokens_per_step / step if step else 0.0
        flops = self._training_flops(length, window)
        mfu = None
        if self.peak is not None:
            mfu = flops * speed / (self.peak * self.accelerator.num_processes)
        pace = sum(self._recent) / len(self._recent) if self._recent else None
        return {
            "tokens_per_second": speed,
            "flops_per_token": flops,
            "mfu": mfu,
            "memory_bytes": int(memory),
            "step_seconds": step,
            "data_seconds": data,
            "log_seconds": log,
            "seconds_left": None if pace is None else pace * steps,
        }

    def _training_flops(self, length: int, window: int | None) -> float:
        stage = (length, window)
        if self._flops is None or self._flops[0] != stage:
            self._flops = (stage, training_flops(self.model, length))
        return self._flops[1]

    def _memory(self) -> float:
        """Bytes: the most that tensors took on a device so far; on a CPU what the process has."""
        device = self.accelerator.device
        if device.type == "cpu":
            return psutil.Process().memory_info().rss
        return torch.accelerator.max_memory_allocated(device)


def _largest(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """The largest of each value over all processes; collective."""
    if accelerator.num_processes == 1:
        return list(values)
    mine = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(mine).amax(0).tolist()
