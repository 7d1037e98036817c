"""Command line of the comparison; exit code 1 where the functions differ."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.library import positive
from benchmarks.titans import cpu, cuda


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.titans")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--repeats", type=positive, help="rounds; default 7")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("titans: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    # On a GPU the memories are measured by themselves where it is missing.
    if options.device == "cpu" and importlib.util.find_spec("titans_pytorch") is None:
        print(
            "titans: titans-pytorch is not installed: pip install 'memlm[bench]'", file=sys.stderr
        )
        return 2
    repeats = options.repeats or (3 if options.quick else 7)
    found, agree = {"cpu": cpu, "cuda": cuda}[options.device].run(repeats, options.quick)
    results = {"repeats": repeats, "quick": options.quick, **found}
    name = f"titans_{options.device}{'_quick' if options.quick else ''}.json"
    print(f"\n{report.save_json(results, options.output / report.machine_name() / name)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
