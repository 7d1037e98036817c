"""What a run was started with: command, code, versions and machines, kept in its folder."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import memlm
from memlm.errors import UserError
from memlm.files import replace_file
from memlm.models.retrofit import describe_base
from memlm.training.together import on_main

STARTS_FILE = "run.json"
_PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy", "safetensors", "datasets")
# Of the launcher, of memlm, and what decides which devices and how many threads there are.
_ENVIRONMENT = (
    *("ACCELERATE_", "FSDP_", "MEMLM_", "NCCL_", "OMP_", "TORCHELASTIC_", "CUDA_VISIBLE_DEVICES"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
_SECRET = ("KEY", "PASSWORD", "SECRET", "TOKEN")


def record_start(
    accelerator: Accelerator, folder: Path, source: Path | None, pretrained: str | None = None
) -> None:
    """Add this start of a run to those in its folder's run.json; collective.

    Args:
        accelerator: the processes of the run.
        folder: the run folder.
        source: the checkpoint it goes on from; None = it is new.
        pretrained: the model that the run started from, a folder or a Hub id; None = none.

    Raises:
        UserError: on every process, when the file is damaged or cannot be written.
    """
    mine = {"host": socket.gethostname(), "device": str(accelerator.device)}
    mine["name"] = _device_name(accelerator.device)
    processes = gather_object([mine])

    def add() -> None:
        start = describe_start() | {"processes": processes}
        start["from"] = None if source is None else str(source)
        start["base"] = None if pretrained is None else describe_base(pretrained)
        starts = [*read_starts(folder), start]
        replace_file(folder / STARTS_FILE, json.dumps(starts, indent=1) + "\n")

    on_main(accelerator, add)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; empty for a run that has none on record.

    Raises:
        UserError: for a file that is no list of starts.
    """
    path = folder / STARTS_FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {_DAMAGED}") from error
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UserError(f"{path}: {_DAMAGED}")
    return starts


_DAMAGED = "not the list of a run's starts that training writes; move it away to go on"


def describe_start() -> dict[str, Any]:
    """When, how, where and with which code this process runs."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "directory": os.getcwd(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT) and not any(word in name for word in _SECRET)
        },
        "host": socket.gethostname(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "code": describe_code(Path(memlm.__file__).parent),
        "versions": _versions(),
    }


def describe_code(package: Path) -> dict[str, Any] | None:
    """The git revision of a package's checkout, and whether the package differs from it.

    None where the package is no part of a git checkout, or git is missing or refuses.
    """
    # A folder of installed packages may lie within somebody else's checkout.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    if revision is None or changes is None:
        return None
    return {"revision": revision, "dirty": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None when it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=30,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "memlm": memlm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
