"""Command line of the comparison; exit code 1 where memlm disagrees with float64."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gated_delta import cpu, cuda
from benchmarks.library import positive


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gated_delta")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--repeats", type=positive, help="rounds; default 7 on the CPU, 20 on a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--seconds", type=float, help="GPU: begin no further size after these")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gated_delta: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    if options.device == "cpu":
        repeats = options.repeats or (3 if options.quick else 7)
        found, agree = cpu.run(repeats, options.quick)
    else:
        repeats = options.repeats or (3 if options.quick else 20)
        found, agree = cuda.run(repeats, options.quick, options.seconds)
    results = {"repeats": repeats, "quick": options.quick, **found}
    name = f"gated_delta_{options.device}{'_quick' if options.quick else ''}.json"
    print(f"\n{report.save_json(results, options.output / report.machine_name() / name)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
