"""Compile Triton kernels for cards that are not there, exactly as their launchers launch them.

A launcher runs on meta tensors under `recorded_launches`: Triton itself derives the signature, the
constants and what is known about divisibility, as it would on the card, and hands them to its
public hook `jit_cache_hook` instead of compiling. `compile_launch` then compiles one such launch
and reads registers and spills from ptxas. Needs Triton's compiler, hence a process without
TRITON_INTERPRET; no GPU is touched.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from memlm.cuda.dispatch import compiling_for, interpreting

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory that one block may use (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One configuration of an operation.

    name: operation, pass and sizes.
    launch: runs the launchers on meta tensors.
    longer: the same with another length and number of sequences, which must need no new binary.
    wgmma: kernels with a product of 64 rows or more, which Hopper's warp groups can take.
    """

    name: str
    launch: Callable[[], object]
    longer: Callable[[], object] | None = None
    wgmma: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Launch:
    """What Triton would compile for one launch on a card of this compute capability.

    constants, attributes: by the path of the argument, as `triton.compiler.ASTSource` takes them.
    """

    kernel: Any
    capability: int
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """Equal for launches that one binary serves."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        described = [sorted((str(k), str(v)) for k, v in part.items()) for part in parts]
        return repr((self.kernel.__module__, self.name, self.capability, described))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of one launch; sizes in bytes, spills in bytes per thread.

    wgmma, tcgen05, mma: matrix instructions in the PTX (Hopper's, Blackwell's, the warp-wide ones).
    serialized: whether ptxas gave up running the wgmma asynchronously.
    """

    specimen: str
    kernel: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    wgmma: int
    tcgen05: int
    mma: int
    serialized: bool
    seconds: float
    error: str | None = None

    def faults(self, wgmma_expected: bool) -> list[str]:
        """What a release must not have, in words."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} + {self.spill_loads} bytes")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"needs {self.shared} bytes of shared memory")
        if wgmma_expected and self.capability == 90 and not self.wgmma:
            found.append("has no wgmma")
        return found


class _AbsentCard:
    """Stands in for Triton's driver: a card of this capability that is only compiled for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton caches the target per device number.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside instead of carrying them out.

    Raises:
        RuntimeError: Triton is in its interpreter, which compiles nothing.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: launches are recorded in a process without it")
    launches = []

    def record(*, fn, compile, **_) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        # Triton hashes its options.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        launches.append(
            Launch(
                fn.jit_function,
                capability,
                dict(compile["signature"]),
                dict(compile["constants"]),
                dict(compile["configs"][0]),
                options,
            )
        )
        return True  # Triton then neither compiles nor launches

    before = driver._active
    driver.set_active(_AbsentCard(capability))
    with knobs.runtime.scope(), compiling_for(capability):
        knobs.runtime.jit_cache_hook = record
        try:
            yield launches
        finally:
            driver._active = before


def compile_launch(launch: Launch, specimen: str) -> Compiled:
    """Compile for the launch's card, always anew; a failure is reported, not raised."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", launch.capability, 32)
    log = io.StringIO()
    start = time.perf_counter()
    error = None
    shared, ptx = 0, ""
    with (
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
        _diagnostics() as diagnostics,
    ):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        try:
            binary = triton.compile(source, target=target, options=dict(launch.options))
            shared, ptx = binary.metadata.shared, binary.asm["ptx"]
        except Exception as failure:  # whatever the compiler raises is a row of the table
            found = [str(failure), *re.findall(r"error: (.*)", diagnostics())]
            error = f"{type(failure).__name__}: {' '.join('; '.join(found).split())[:300]}"
    seconds = time.perf_counter() - start
    return Compiled(
        specimen,
        launch.name,
        launch.capability,
        launch.options["num_warps"],
        launch.options["num_stages"],
        *resources(log.getvalue()),
        shared,
        ptx.count("wgmma.mma_async"),
        ptx.count("tcgen05.mma"),
        ptx.count("mma.sync"),
        "wgmma.mma_async instructions are serialized" in log.getvalue(),
        round(seconds, 2),
        error,
    )


@contextlib.contextmanager
def _diagnostics() -> Iterator[Callable[[], str]]:
    """Collect what the compiler's C++ side writes to standard error, where a failure dumps all."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as collected:
        os.dup2(collected.fileno(), 2)

        def read() -> str:
            collected.seek(0)
            return collected.read().decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(before, 2)
            os.close(before)


def resources(ptxas_log: str) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and of spill loads in the output of ``ptxas -v``."""

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, ptxas_log))

    return (
        max((int(n) for n in re.findall(r"Used (\d+) registers", ptxas_log)), default=0),
        total(r"(\d+) bytes spill stores"),
        total(r"(\d+) bytes spill loads"),
    )


def distinct_launches(
    specimens: Iterable[Specimen],
    capabilities: Iterable[int] = CAPABILITIES,
    one_per_kernel: bool = False,
) -> list[tuple[Specimen, Launch, int]]:
    """The launches that need a binary of their own, each with its place in its specimen.

    one_per_kernel: only the first launch of each kernel for each capability.
    """
    found = {}
    for specimen in specimens:
        for capability in capabilities:
            with recorded_launches(capability) as launches:
                specimen.launch()
            for place, launch in enumerate(launches):
                kernel = (launch.kernel.__module__, launch.name, launch.capability)
                key = kernel if one_per_kernel else launch.key
                found.setdefault(key, (specimen, launch, place))
    return list(found.values())


def recompiled(specimen: Specimen, capability: int = 90) -> list[str]:
    """The kernels that another length or number of sequences would compile anew."""
    if specimen.longer is None:
        return []
    with recorded_launches(capability) as launches:
        specimen.launch()
    known = {launch.key for launch in launches}
    with recorded_launches(capability) as launches:
        specimen.longer()
    return sorted({launch.name for launch in launches if launch.key not in known})


def compile_table(
    table: Callable[[], list[Specimen]],
    capabilities: Iterable[int] = CAPABILITIES,
    processes: int = 1,
    progress: Callable[[Compiled], object] = lambda _: None,
    one_per_kernel: bool = False,
) -> list[Compiled]:
    """Compile every distinct launch of the specimens that `table` returns.

    table: a function that another process can import. processes: 1 is this one. progress: called
    as each one is done. one_per_kernel: as `distinct_launches` takes it.
    """
    jobs = [
        (table, specimen.name, launch.capability, place)
        for specimen, launch, place in distinct_launches(table(), capabilities, one_per_kernel)
    ]
    results = []
    if processes == 1:  # others would only import everything again
        for job in jobs:
            results.append(_compile_job(job))
            progress(results[-1])
        return results
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for result in pool.map(_compile_job, jobs):
            progress(result)
            results.append(result)
    return results


def _compile_job(job: tuple[Callable[[], list[Specimen]], str, int, int]) -> Compiled:
    # A kernel cannot be sent to another process; recording it again takes milliseconds.
    table, name, capability, place = job
    specimen = next(specimen for specimen in table() if specimen.name == name)
    with recorded_launches(capability) as launches:
        specimen.launch()
    return compile_launch(launches[place], name)
