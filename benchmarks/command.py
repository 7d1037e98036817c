"""The command line of a comparison that runs on a CPU or a GPU: `python -m benchmarks.NAME`."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.library import positive


def compare(name: str, arguments: Sequence[str] | None = None, cpu_peer: str | None = None) -> int:
    """Run `benchmarks.NAME.cpu` or `.cuda`, whose `run(repeats, quick)` returns (results, agree).

    Args:
        name: of the comparison; the results are saved as NAME_DEVICE.json.
        arguments: the command line's; None = those of this process.
        cpu_peer: the distribution that the comparison on a CPU cannot do without. On a GPU memlm is
            measured by itself where it is missing.

    Returns:
        The exit code: 0; 1 where results differ by more than they may; 2 without the device or
        the peer.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--repeats", type=positive, help="rounds; default 7")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{name}: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    needs_peer = options.device == "cpu" and cpu_peer is not None
    if needs_peer and importlib.util.find_spec(cpu_peer.replace("-", "_")) is None:
        print(f"{name}: {cpu_peer} is not installed: pip install 'memlm[bench]'", file=sys.stderr)
        return 2
    repeats = options.repeats or (3 if options.quick else 7)
    comparison = importlib.import_module(f"benchmarks.{name}.{options.device}")
    found, agree = comparison.run(repeats, options.quick)
    results = {"repeats": repeats, "quick": options.quick, **found}
    file = f"{name}_{options.device}{'_quick' if options.quick else ''}.json"
    print(f"\n{report.save_json(results, options.output / report.machine_name() / file)}")
    return 0 if agree else 1
