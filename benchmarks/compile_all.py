"""Compile every kernel for sm_80, sm_90 and sm_100 and print what each one uses.

``python -m benchmarks.compile_all``; needs Triton, no GPU. Exit code 1 where a kernel does not
compile, spills, needs more shared memory than a block may have, has no wgmma though it could, or
is compiled anew for another length.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import memlm
from benchmarks import report
from memlm.cuda.dispatch import interpreting

HEADER = (
    "specimen",
    "kernel",
    "sm",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared KiB",
    "matrix units",
    "seconds",
    "faults",
)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.compile_all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side")
    parser.add_argument("--output", type=Path, default=report.RESULTS / "compile")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("compile_all: triton is not installed", file=sys.stderr)
        return 2
    if interpreting():
        print("compile_all: TRITON_INTERPRET is set, nothing would be compiled", file=sys.stderr)
        return 2
    # Results of another run, or of the user's own programs, are neither read nor touched.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        results, faults = _compile(options.quick, options.processes)
    results |= {"machine": report.machine()}
    name = f"triton-{triton.__version__}"
    path = report.save_json(results, options.output / f"{name}.json")
    text = report.table(HEADER, [_row(one, one["faults"]) for one in results["kernels"]])
    path.with_suffix(".md").write_text(f"# {name}\n\n{text}\n", encoding="utf-8")
    bad = sum(map(bool, faults))
    print(text)
    print(f"\n{len(faults)} binaries, {bad} with faults; nvcc: {results['nvcc']}; {path}")
    for name, found in results["recompiled"].items():
        print(f"{name}: another length compiles {', '.join(found)} anew")
    return 1 if bad or results["recompiled"] else 0


def _compile(quick: bool, processes: int) -> tuple[dict, list[str]]:
    from benchmarks import aot, nvcc, specimens

    specimens_of = specimens.quick if quick else specimens.full
    table = specimens_of()
    wgmma = {specimen.name: specimen.wgmma for specimen in table}
    recompiled = {one.name: found for one in table if (found := aot.recompiled(one))}
    compiled = aot.compile_table(
        specimens_of, processes=processes, progress=_progress, one_per_kernel=quick
    )
    sources = nvcc.cuda_sources(Path(memlm.__file__).parent / "cuda")
    if nvcc.nvcc() is None:
        skipped = "not installed"
    else:
        skipped = f"{len(sources)} files"
        for source in sources:
            for capability in nvcc.ARCHITECTURES:
                compiled += nvcc.compile_cuda(source, capability)
    faults = ["; ".join(one.faults(one.kernel in wgmma.get(one.specimen, ()))) for one in compiled]
    kernels = [
        dataclasses.asdict(one) | {"faults": fault}
        for one, fault in zip(compiled, faults, strict=True)
    ]
    return {"kernels": kernels, "recompiled": recompiled, "nvcc": skipped}, faults


def _progress(one) -> None:
    if sys.stderr.isatty():
        print(f"\r{one.seconds:6.1f} s  {one.kernel:30.30s}", end="", file=sys.stderr)


def _row(one: dict, fault: str) -> list:
    units = {name: one[name] for name in ("wgmma", "tcgen05", "mma") if one[name]}
    described = ", ".join(f"{count} {name}" for name, count in units.items())
    return [
        one["specimen"],
        one["kernel"],
        one["capability"],
        one["num_warps"],
        one["num_stages"],
        one["registers"],
        one["spill_stores"] + one["spill_loads"],
        round(one["shared"] / 1024, 1),
        described + (", serialized" if one["serialized"] else ""),
        one["seconds"],
        fault,
    ]


if __name__ == "__main__":
    sys.exit(main())
