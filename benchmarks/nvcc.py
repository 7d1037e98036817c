"""Compile CUDA C++ files without a GPU and read what each kernel uses."""

import functools
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from torch.utils import cpp_extension

from benchmarks.aot import Compiled, resources

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}


@functools.cache
def nvcc() -> str | None:
    """The CUDA compiler's path; None where there is none."""
    return shutil.which("nvcc")


def cuda_sources(folder: Path) -> list[Path]:
    """The CUDA C++ files below `folder`."""
    return sorted(folder.rglob("*.cu"))


def compile_cuda(source: Path, capability: int) -> list[Compiled]:
    """Registers, spills and static shared memory of every kernel in a file.

    Raises:
        RuntimeError: nvcc is missing or refuses the file; the message holds its output.
    """
    if nvcc() is None:
        raise RuntimeError("nvcc is not installed")
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = ["-std=c++17", f"-arch={ARCHITECTURES[capability]}", "-Xptxas", "-v"]
        command = [nvcc(), *options, *(f"-I{path}" for path in includes)]
        command += ["-cubin", str(source), "-o", f"{folder}/out.cubin", "--keep"]
        done = subprocess.run(
            [*command, "--keep-dir", folder], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise RuntimeError(f"nvcc refuses {source}: {done.stderr.strip()}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    seconds = round(time.perf_counter() - start, 2)
    bodies = dict(re.findall(r"\.entry\s+(\w+)(.*?)(?=\.entry|\Z)", ptx, re.S))
    logs = re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", done.stderr, re.S
    )
    return [
        _compiled(source.name, name, capability, log, bodies[name], seconds) for name, log in logs
    ]


def _compiled(
    source: str, name: str, capability: int, log: str, ptx: str, seconds: float
) -> Compiled:
    shared = re.search(r"(\d+) bytes smem", log)
    return Compiled(
        source,
        name,
        capability,
        num_warps=0,
        num_stages=0,
        registers=resources(log)[0],
        spill_stores=resources(log)[1],
        spill_loads=resources(log)[2],
        shared=int(shared.group(1)) if shared else 0,
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
        serialized="wgmma.mma_async instructions are serialized" in log,
        seconds=seconds,
    )
