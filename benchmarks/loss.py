"""The loss of a language model's head, without its logits and with them.

python -m benchmarks.loss --device {cpu,cuda}

`linear_cross_entropy` beside a linear layer with torch's cross-entropy, that under torch.compile,
and torch's own linear_cross_entropy in chunks: the mean loss of 4096 tokens and its gradients for
the tokens and the weight, in float32 on one thread of a CPU and in bfloat16 on a GPU. Exit code 1
where they differ.

The logits are normal with a standard deviation of 3. What is probable lies anywhere in the
vocabulary, so that hardly a tile of the gradient is negligible.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.library import (
    one_thread,
    peak_allocated,
    peak_memory,
    positive,
    ratio,
    time_interleaved,
)
from memlm.cuda import linear_cross_entropy

SPREAD = 3.0  # of the logits
PLAIN, COMPILED, CHUNKED = "linear, cross_entropy", "the same, compiled", "torch, in chunks"
OURS = "memlm"
REPEATS = {"cpu": 3, "cuda": 20}
SECONDS = 60.0  # of a vocabulary on a GPU
# What ours has to reach: at most this much memory beyond the gradients, in percent of the logits in
# float32, and at most so many times as long as which of the others.
BARS = {"cpu": (5.0, 1.3, PLAIN), "cuda": (1.0, 1.0, COMPILED)}
SMALL = 1 << 24  # bytes of logits
# Largest relative root mean square difference from the gradients of the first.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden, weight and targets


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tokens, words and channels."""

    V: int
    N: int = 4096
    D: int = 512
    dtype: torch.dtype = torch.float32

    @property
    def logits_bytes(self) -> int:
        """Of the logits in float32."""
        return 4 * self.N * self.V

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of hidden and weight."""
        return (self.N + self.V) * self.D * self.dtype.itemsize

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [N, D] and weight [V, D], which take gradients, and targets [N]."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.N, self.D, generator=generator)
        weight = torch.randn(self.V, self.D, generator=generator) * SPREAD / self.D**0.5
        targets = torch.randint(self.V, (self.N,), generator=generator)
        leaves = (x.to(device, self.dtype).requires_grad_() for x in (hidden, weight))
        return *leaves, targets.to(device)


def contestants() -> dict[str, Loss]:
    """The mean loss by each."""

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets)[0] / len(targets)

    found = {PLAIN: plain, COMPILED: torch.compile(plain, dynamic=False)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 and newer

        def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(hidden, weight, targets, options=options)

        found[CHUNKED] = chunked
    return found | {OURS: ours}


def measure(problem: Problem, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each contestant: seconds, peak bytes and differences, or why it has none."""
    hidden, weight, targets = problem.inputs(device)
    losses = contestants()
    rows = {name: {"problem": problem, "name": name} for name in losses}
    first: list[Tensor] = []

    def step_of(name: str, loss: Loss) -> Callable[[int], None]:
        def step() -> tuple[Tensor, ...]:
            value = loss(hidden, weight, targets)
            return value.detach(), *torch.autograd.grad(value, [hidden, weight])

        def numbered(number: int) -> None:
            if number:
                step()
                return
            found = step()  # compiles
            if not first:
                first.extend(found)
            rows[name]["differences"] = _differences(found, first)
            del found
            rows[name]["peak_bytes"] = (
                peak_memory(lambda _: step(), device)
                if device == "cuda"
                else peak_allocated(lambda _: step())
            )

        return numbered

    runs = {name: step_of(name, loss) for name, loss in losses.items()}
    limit = SECONDS if device == "cuda" else None
    for name, seconds in time_interleaved(runs, device, repeats, limit).items():
        rows[name]["seconds"] = seconds
    return list(rows.values())


def _differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    names = ("loss", "gradient of hidden", "gradient of the weight")
    return {
        name: float((a - b).float().norm() / b.float().norm())
        for name, a, b in zip(names, found, expected, strict=True)
    }


def judge(rows: list[dict[str, Any]], device: str) -> None:
    """Add to the rows of one problem how they stand to the first, and to ours its verdict.

    Logits of less than 16 MiB are no problem, and are not judged.
    """
    for row in rows:
        row["failed"] = row["seconds"] if isinstance(row["seconds"], str) else None
        if row["failed"] is None:
            problem = row["problem"]
            beyond = row["peak_bytes"] - problem.gradient_bytes
            row["percent"] = 100 * beyond / problem.logits_bytes
    by_name = {row["name"]: row for row in rows}
    base, ours = by_name[PLAIN], by_name[OURS]
    for row in rows:
        if row["failed"] is None and base["failed"] is None:
            row["as_long"] = ratio(row["seconds"], base["seconds"])
    most, longest, peer = BARS[device]
    small = ours["problem"].logits_bytes < SMALL
    if small or ours["failed"] is not None or by_name[peer]["failed"] is not None:
        ours["verdict"] = "not judged"
        return
    ours["as_long_as_the_bar"] = ratio(ours["seconds"], by_name[peer]["seconds"])
    kept = ours["percent"] <= most and ours["as_long_as_the_bar"].median <= longest
    ours["verdict"] = "met" if kept else "MISSED"


def show(rows: list[dict[str, Any]], device: str) -> None:
    """Print the table."""
    most, longest, peer = BARS[device]
    print(f"The bar: at most {most:g} % of the logits in float32 beyond the gradients, and at most")
    print(f"{longest:g} times as long as '{peer}'")
    header = ("words", "mean loss and gradients", "ms", "times as long", "peak MB", "% of logits")
    header += ("largest difference", "verdict")
    shown = [
        [
            row["problem"].V,
            row["name"],
            row["failed"] or 1000 * statistics.median(row["seconds"]),
            row.get("as_long"),
            row["peak_bytes"] / 1e6 if "peak_bytes" in row else None,
            row.get("percent"),
            max(row["differences"].values()) if "differences" in row else None,
            row.get("verdict", ""),
        ]
        for row in rows
    ]
    print(report.table(header, shown))


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether all that ran computed the same; NaN is not the same."""
    return all(
        difference <= TOLERANCE[row["problem"].dtype]
        for row in rows
        for difference in row.get("differences", {}).values()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--repeats", type=positive, help="rounds; default 3 on a CPU, else 20")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("loss: torch finds no CUDA GPU", file=sys.stderr)
        return 2
    repeats = options.repeats or (2 if options.quick else REPEATS[device])
    problems = [Problem(2048, 512, 32)] if options.quick else [Problem(2**15), Problem(2**17)]
    if device == "cuda":
        problems = [dataclasses.replace(one, dtype=torch.bfloat16) for one in problems]
    rows = []
    with one_thread() if device == "cpu" else contextlib.nullcontext():
        machine = report.machine()
        for problem in problems:
            found = measure(problem, device, repeats)
            judge(found, device)
            rows += found
    sizes = f"{problems[0].N} tokens of {problems[0].D} channels, {problems[0].dtype}"
    print(f"{sizes}; median of {'processor time' if device == 'cpu' else 'time'}, peak memory as")
    print("torch's profiler sees it" if device == "cpu" else "torch's allocator counts it")
    show(rows, device)
    same = agree(rows)
    print(f"\n{'All agree' if same else 'THE RESULTS DISAGREE'} within {TOLERANCE}")
    results = {"machine": machine, "repeats": repeats, "quick": options.quick, "rows": rows}
    file = f"loss{'_quick' if options.quick else ''}.json"
    print(f"\n{report.save_json(results, options.output / report.machine_name() / file)}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
