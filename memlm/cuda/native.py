"""C++ for the CPU, compiled when it is first used: `load`, `unavailable` and `refusal`.

One source with a plain C interface makes one library, in a folder of the user's cache and named by
all that it depends on. torch.utils.cpp_extension would need ninja, and time for torch's headers.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from memlm.cuda.dispatch import may_be_chosen

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-ffp-contract=fast",
)
# Not every compiler knows it for every CPU; what it makes without it is slower.
NATIVE = "-march=native"
PATIENCE = 120  # seconds a compiler may take


def load(source: Path) -> ctypes.CDLL:
    """The library made of a C++ file.

    Raises:
        RuntimeError: there is none; the message is what `unavailable` returns.
    """
    found = _library(source)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unavailable(source: Path) -> str | None:
    """Why there is no library of a C++ file (no compiler, it fails, ...); None where there is one.

    The first call compiles if the cache does not have the library.
    """
    found = _library(source)
    return found if isinstance(found, str) else None


@torch.compiler.assume_constant_result
def refusal(operation: str, source: Path) -> str | None:
    """As `unavailable`, without compiling for an operation that another implementation is forced
    on."""
    if source not in _tried and not may_be_chosen(operation, "native"):
        return "another implementation is forced, nothing is compiled"
    return unavailable(source)


# Sources that were compiled, or failed to: decoding asks for every token.
_tried: set[Path] = set()


@functools.cache
def _library(source: Path) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    _tried.add(source)
    if sys.platform == "win32":
        return "native kernels are not made for Windows"
    compiler = _compiler()
    if compiler is None:
        return f"no C++ compiler: set CXX or install one of {', '.join(COMPILERS)}"
    return built(source, compiler, FLAGS, (NATIVE,), _cpu())


def built(
    source: Path,
    compiler: Sequence[str],
    flags: Sequence[str],
    optional: Sequence[str] = (),
    machine: str = "",
) -> ctypes.CDLL | str:
    """The library that a compiler makes of a file, from the cache if it is there.

    Args:
        source: the file.
        compiler: its command.
        flags: arguments; `optional` are more of them, left out where it fails with them.
        machine: what the library depends on besides the sources and the compiler.

    Returns:
        The library, or why there is none.
    """
    try:
        key = _key(source, compiler, [*flags, *optional, machine])
        name = f"{source.parent.name}-{key}.so"
        with tempfile.TemporaryDirectory() as elsewhere:
            folder = _cache_folder() or Path(elsewhere)
            if not (folder / name).exists():
                _compile(source, folder / name, [*compiler, *flags], optional)
            # The file may go as soon as it is loaded.
            return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{source.name} does not compile or load: {_first_line(error)}"


def _compiler() -> list[str] | None:
    """The command of the first compiler there is."""
    for command in (os.environ.get("CXX", ""), *COMPILERS):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _key(source: Path, compiler: Sequence[str], others: Sequence[str]) -> str:
    """A name for all that the library depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    parts = [*(path.read_text() for path in _sources(source)), version.stdout, *compiler, *others]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _sources(path: Path) -> list[Path]:
    """A C++ file and the headers beside it that it includes, each once."""
    found, todo = [], [path.resolve()]
    while todo:
        current = todo.pop()
        if current not in found:
            found.append(current)
            names = re.findall(r'^#include "(.+)"$', current.read_text(), re.MULTILINE)
            todo += [(current.parent / name).resolve() for name in names]
    return found


def _cpu() -> str:
    """What tells a CPU's instruction set from another's; homes are shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _cache_folder() -> Path | None:
    """Where libraries are kept; None where that cannot be written."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "memlm" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _compile(source: Path, target: Path, command: list[str], optional: Sequence[str]) -> None:
    """Make the library under another name and then rename it: others may be at it too."""
    logger.info("compiling %s of %s with %s", source.name, source.parent.name, command[0])
    handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".unfinished")
    os.close(handle)
    try:
        command = [*command, "-o", unfinished, str(source)]
        options = {"capture_output": True, "text": True, "timeout": PATIENCE}
        if not optional or subprocess.run([*command, *optional], **options).returncode:
            subprocess.run(command, **options, check=True)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    """The compiler's first error, or what else went wrong, in one line."""
    lines = (getattr(error, "stderr", None) or "").splitlines()
    lines = [line for line in lines if "error" in line] or lines or str(error).splitlines()
    return lines[0].strip() if lines else type(error).__name__
