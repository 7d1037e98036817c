"""CUDA C++, compiled when it is first used by nvcc: `load`, `unavailable` and `refusal`.

As `memlm.cuda.native` does it for C++: a plain C interface, a library in the user's cache. It is
made for the compute capability of the card at hand; PyTorch is not needed to build it.
"""

import ctypes
import functools
import os
import shutil
import sys
from pathlib import Path

import torch

from memlm.cuda import native
from memlm.cuda.dispatch import capability, may_be_chosen

HOMES = ("CUDA_HOME", "CUDA_PATH")
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")


def load(source: Path, device: torch.device) -> ctypes.CDLL:
    """The library made of a CUDA C++ file for a card.

    Raises:
        RuntimeError: there is none; the message is what `unavailable` returns.
    """
    found = _library(source, capability(device))
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unavailable(source: Path, device: torch.device) -> str | None:
    """Why there is no library of a file for a card (no nvcc, it fails, ...); None where there is.

    The first call compiles if the cache does not have the library.
    """
    found = _library(source, capability(device))
    return found if isinstance(found, str) else None


@torch.compiler.assume_constant_result
def refusal(operation: str, source: Path, device: torch.device) -> str | None:
    """As `unavailable`, without compiling for an operation that another implementation is forced
    on."""
    if not may_be_chosen(operation, "cuda"):
        return "another implementation is forced, nothing is compiled"
    return unavailable(source, device)


def nvcc() -> str | None:
    """The CUDA compiler's path; None where there is none."""
    folders = [os.environ[name] for name in HOMES if os.environ.get(name)] + ["/usr/local/cuda"]
    paths = [shutil.which("nvcc"), *(shutil.which(f"{folder}/bin/nvcc") for folder in folders)]
    return next((path for path in paths if path), None)


@functools.cache
def _library(source: Path, target: int) -> ctypes.CDLL | str:
    """The library for a compute capability (80 for 8.0), or why there is none."""
    if sys.platform == "win32":
        return "CUDA C++ is not compiled on Windows"
    compiler = nvcc()
    if compiler is None:
        return f"no CUDA compiler: install nvcc or set {HOMES[0]}"
    return native.built(source, [compiler], (*FLAGS, f"-arch=sm_{target}"))
