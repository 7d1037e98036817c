"""Command line of the comparison; exit code 1 where results differ by more than rounding."""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.library import positive


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--repeats", type=positive, help="rounds; default 7")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("retrieval: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    repeats = options.repeats or (3 if options.quick else 7)
    comparison = importlib.import_module(f"benchmarks.retrieval.{options.device}")
    found, agree = comparison.run(repeats, options.quick)
    results = {"repeats": repeats, "quick": options.quick, **found}
    name = f"retrieval_{options.device}{'_quick' if options.quick else ''}.json"
    print(f"\n{report.save_json(results, options.output / report.machine_name() / name)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
