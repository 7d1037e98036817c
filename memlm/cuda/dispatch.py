"""The one place that chooses which implementation of an operation runs.

Every public operation of ``memlm.cuda`` has a ``reference`` (the readable formula), an ``eager``
(fast torch) and possibly faster implementations. The environment variable ``MEMLM_KERNELS`` forces
one of them by name, for all operations or for some (``auto,linear_recurrence=triton``); ``auto``
(the default) takes the fastest one that is available and trusted on the device at hand, and warns
once where that leaves a GPU to plain torch.
"""

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping

import torch

from memlm.errors import UserError, nearest

logger = logging.getLogger(__name__)

VARIABLE = "MEMLM_KERNELS"
SPEED_ORDER = ("cuda", "triton", "native", "eager", "reference")  # fastest first
KERNELS = ("cuda", "triton")

_logged: set[tuple[str, str, str]] = set()
Chooser = Callable[[str, Mapping[str, str | None]], str]
_chooser: contextvars.ContextVar[Chooser | None] = contextvars.ContextVar("chooser", default=None)


def choose(
    operation: str,
    implementations: Mapping[str, Callable | str],
    device: torch.device | None = None,
) -> Callable:
    """Return the implementation of `operation` that ``MEMLM_KERNELS`` asks for.

    Args:
        operation: name of the operation, used in messages.
        implementations: from a name of `SPEED_ORDER` to a callable, or to a string that says why
            the operation cannot take this implementation for these arguments.
        device: where the tensors are; default the CPU.

    Raises:
        UserError: ``MEMLM_KERNELS`` is not ``auto`` or a name of `SPEED_ORDER`.
        RuntimeError: the forced implementation is unavailable; the message names the reason.
    """
    refusals = {
        name: found if isinstance(found, str) else None for name, found in implementations.items()
    }
    return implementations[choose_name(operation, refusals, device)]


@torch.compiler.assume_constant_result
def choose_name(
    operation: str, refusals: Mapping[str, str | None], device: torch.device | None = None
) -> str:
    """`choose` by name, which torch.compile takes for a constant.

    `refusals` names the implementations there are, each with the reason why the operation cannot
    take it for these arguments, or None. Raises what `choose` raises.
    """
    chooser = _chooser.get()
    if chooser is not None:
        return chooser(operation, refusals)
    device = torch.device("cpu") if device is None else device
    wanted = _wanted(operation)
    if wanted == "auto":
        return _fastest(operation, refusals, device)
    reason = "it has no such implementation"
    if wanted in refusals:
        reason = refusals[wanted] or _unavailable(wanted, device)
    if reason is not None:
        raise RuntimeError(f"{VARIABLE}={wanted} is unavailable for {operation}: {reason}")
    return wanted


def may_be_chosen(operation: str, implementation: str) -> bool:
    """Whether ``MEMLM_KERNELS`` names this implementation or leaves the choice open.

    Under `chosen_by` nothing runs that is not asked for by name.
    """
    if _chooser.get() is not None:
        return False
    return _wanted(operation) in ("auto", implementation)


@contextlib.contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Let a function choose, whatever ``MEMLM_KERNELS`` says and the device is.

    To find what another device would keep for a backward pass, with tensors that have only a shape.

    Args:
        chooser: gives the name of an implementation for an operation and the `refusals` of
            `choose_name`.
    """
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)


def _wanted(operation: str) -> str:
    """What ``MEMLM_KERNELS`` says of this operation, or else of all."""
    found = _entries(os.environ.get(VARIABLE, "auto"))
    return found.get(operation, found[""])


@functools.lru_cache(maxsize=8)
def _entries(value: str) -> dict[str, str]:
    """The implementations that a value of ``MEMLM_KERNELS`` names, by operation; "" is all."""
    found = {"": "auto"}
    for entry in value.split(","):
        name, _, wanted = entry.strip().rpartition("=")
        options = ("auto", *reversed(SPEED_ORDER))
        if wanted not in options:
            raise UserError(
                f"{VARIABLE}={value}: {wanted} is not one of {', '.join(options)}"
                f"{nearest(wanted, options)}"
            )
        found[name] = wanted
    return found


def _fastest(operation: str, refusals: Mapping[str, str | None], device: torch.device) -> str:
    passed_over = []
    for name in SPEED_ORDER:
        if name not in refusals:
            continue
        reason = refusals[name] or _unavailable(name, device)
        if reason is None and name in KERNELS:
            reason = distrusted(operation, device)
        if reason is None:
            _log_choice(operation, name, device, passed_over)
            return name
        passed_over.append(f"{name}: {reason}")
    raise RuntimeError(f"{operation} has no available implementation ({'; '.join(passed_over)})")


def _log_choice(operation: str, name: str, device: torch.device, passed_over: list[str]) -> None:
    if (operation, name, device.type) in _logged:
        return
    _logged.add((operation, name, device.type))
    if device.type == "cuda" and name not in KERNELS and passed_over:
        reasons = "; ".join(passed_over)
        logger.warning("%s: the %s implementation on a GPU (%s)", operation, name, reasons)
    else:
        logger.info("%s: using the %s implementation", operation, name)


def _unavailable(name: str, device: torch.device) -> str | None:
    """Why implementations of this kind cannot run on `device`; None where they can."""
    if name == "triton":
        return triton_unavailable(device)
    if name == "eager":
        return None
    if name == "cuda" and device.type != "cuda":
        return f"the tensors are on {device.type}, it runs on a CUDA GPU"
    if name == "native" and device.type != "cpu":
        return f"the tensors are on {device.type}, it runs on the CPU"
    return None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    if not _has_triton():
        return "triton is not installed"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type} and TRITON_INTERPRET is not set"
    found = capability(device)
    if found < 80:
        return f"the GPU has compute capability {found / 10}, the kernels need 8.0"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def distrusted(operation: str, device: torch.device) -> str | None:
    """Why ``auto`` passes Triton kernels over although they run; None where it trusts them.

    Triton 3.4 up to 3.7.0 compiles gated recurrences to wrong gradients on Hopper cards
    (flash-linear-attention issue 640); naming the implementation in ``MEMLM_KERNELS`` overrides it.
    """
    if device.type != "cuda":
        return "the interpreter is only for tests"
    version = triton_version()
    affected = operation == "linear_recurrence" and capability(device) // 10 == 9
    if affected and (3, 4, 0) <= version < (3, 7, 1):
        found = ".".join(map(str, version))
        return (
            f"triton {found} is known for wrong gradients on compute capability 9; use triton "
            f"3.7.1 or newer, or force it with {VARIABLE}=auto,{operation}=triton"
        )
    return None


# The card that launches on meta tensors are compiled for; 90 unless `compiling_for` says otherwise.
_target: contextvars.ContextVar[int] = contextvars.ContextVar("target", default=90)


def capability(device: torch.device) -> int:
    """Compute capability as one number, 80 for 8.0; the compilation target off a GPU."""
    if device.type != "cuda":
        return _target.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the card; of an H100 off a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def compiling_for(target: int) -> Iterator[None]:
    """Let launchers configure kernels for a card that is not there (80, 90, 100)."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@functools.cache
def triton_version() -> tuple[int, int, int]:
    """The version of the installed Triton."""
    import triton

    numbers = [int(number) for number in re.findall(r"\d+", triton.__version__)[:3]]
    major, minor, patch = [*numbers, 0, 0][:3]
    return major, minor, patch
