"""Random facts stored per multiply-add: a product-key layer beside a SwiGLU layer.

    python -m benchmarks.capacity [--quick]

A fact is a random key of 64 channels with one of 256 classes, drawn at random: 8 bits that nothing
but memory can know. A model is one layer and a linear head from its output to the classes. It is
trained on all facts and asked for each of them once more; what it stores is

    bits = facts * max(0, log2(256) - mean cross-entropy in bits),

by which knowing the model shortens the code of the classes: 8 bits a fact where it is certain of
the right class, 0 where it guesses. Data, head, optimizer, schedule, steps and batch are the same
for both layers, and so are the multiply-adds, to half a percent. The SwiGLU counts at the best of
four learning rates and of all numbers of facts, the product keys at one learning rate.

Not counted are the head, which is the same, biases, norms and activations, and the comparisons by
which product keys are chosen; the time of a step has them all.

A residual around the layer suits the SwiGLU and not the product keys, so each has the form in
which it stores more; both other forms are rows of the table, with one seed.

Two processes of one thread each take the runs in turn. Finished runs are kept one by one in
benchmarks/results/MACHINE/capacity.json with a plot beside, and are not trained again.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.capacity_report import comparison_table, facts_table, plot
from benchmarks.library import one_thread
from benchmarks.runs import load_runs, save_run
from memlm.layers.mlp import SwiGLU
from memlm.memory import CallContext, ProductKey, ProductKeyConfig

SIZE, CLASSES = 64, 256
WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, and what it is trained with.

    Attributes:
        layer: "swiglu" or "product_key".
        sizes: intermediate_size of the one, fields of ProductKeyConfig of the other.
        residual: whether the head sees the key plus the layer's output.
        learning_rates: tried with every number of facts.
        facts: numbers of facts.
        seeds: seeds of facts, parameters and order.
    """

    layer: str
    sizes: dict[str, Any]
    residual: bool
    learning_rates: tuple[float, ...]
    facts: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a row with one learning rate, number of facts and seed.

    steps, batch: of the training; every pass over the facts has an order of its own.
    """

    row: str
    layer: str
    sizes: dict[str, Any]
    residual: bool
    learning_rate: float
    facts: int
    seed: int
    steps: int = 3000
    batch: int = 1024

    @property
    def key(self) -> str:
        rate = f"learning rate {self.learning_rate:g}"
        return f"{self.row}, {self.facts} facts, {rate}, seed {self.seed}"


SWIGLU = {"intermediate_size": 91}
PRODUCT_KEYS = {"num_keys": 64, "key_size": 64, "num_heads": 2, "top_k": 8, "variant": "plain"}
RATES = (0.01, 0.02, 0.04, 0.08)
FACTS = (8192, 9216, 10240, 16384, 49152, 65536)
DENSE, MEMORY = "SwiGLU", "product keys"  # the rows that are compared
ROWS = {
    DENSE: Row("swiglu", SWIGLU, True, RATES, FACTS),
    MEMORY: Row("product_key", PRODUCT_KEYS, False, (0.03,), (8192, 16384, 49152, 65536)),
    "SwiGLU, no residual": Row("swiglu", SWIGLU, False, RATES, (10240,), (0,)),
    "product keys, residual": Row("product_key", PRODUCT_KEYS, True, (0.03,), (49152,), (0,)),
}


class FactModel(nn.Module):
    """A layer between keys of SIZE channels and a linear head that both kinds share."""

    def __init__(self, layer: str, sizes: dict[str, Any], residual: bool):
        super().__init__()
        self.residual = residual
        if layer == "swiglu":
            self.layer: nn.Module = SwiGLU(SIZE, **sizes)
        else:
            self.layer = ProductKey(ProductKeyConfig(**sizes), SIZE)
        self.head = nn.Linear(SIZE, CLASSES)

    def forward(self, keys: Tensor) -> Tensor:
        """Keys [T, SIZE] -> logits [T, CLASSES]."""
        if isinstance(self.layer, ProductKey):
            out = self.layer(keys[None], None, CallContext.plain(1, len(keys)))[0][0]
        else:
            out = self.layer(keys)
        return self.head(keys + out if self.residual else out)

    def multiply_adds(self) -> int:
        """Of the layer for one key, without the head: matrices, scores of half keys, rows read."""
        return self.layer.flops(1) // 2


def random_facts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys [count, SIZE], normally distributed, and their classes int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, SIZE, generator=generator)
    return keys, torch.randint(CLASSES, (count,), generator=generator)


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` batches: passes over all facts, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch:
            left = torch.cat((left, torch.randperm(count, generator=generator)))
        yield left[:batch]
        left = left[batch:]


def stored_bits(logits: Tensor, classes: Tensor) -> float:
    """Bits by which the logits [T, C] shorten the code of the classes [T]; 0 if not finite."""
    nats = float(F.cross_entropy(logits.double(), classes))
    if not math.isfinite(nats):
        return 0.0
    return len(classes) * max(0.0, math.log2(logits.shape[1]) - nats / math.log(2))


def train(run: Run) -> dict[str, Any]:
    """Train and question one model.

    Returns:
        {"bits": stored, "accuracy": share of the facts whose most likely class is right,
        "seconds": processor time of the training, "multiply_adds": of the layer for one key,
        "parameters": of layer and head}.
    """
    torch.manual_seed(run.seed)
    model = FactModel(run.layer, run.sizes, run.residual)
    keys, classes = random_facts(run.facts, run.seed)
    optimizer = torch.optim.Adam(model.parameters(), run.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.learning_rate, total_steps=run.steps
    )
    start = time.process_time()
    for chosen in batches(run.facts, run.batch, run.steps, run.seed):
        loss = F.cross_entropy(model(keys[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        logits = torch.cat([model(part) for part in keys.split(4096)])
    return {
        "bits": stored_bits(logits, classes),
        "accuracy": float((logits.argmax(1) == classes).double().mean()),
        "seconds": seconds,
        "multiply_adds": model.multiply_adds(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables and draw the plot; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.capacity")
    parser.add_argument("--quick", action="store_true", help="few facts and steps, a few seconds")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    name = "capacity_quick.json" if options.quick else "capacity.json"
    path = options.output / report.machine_name() / name
    wanted = quick_runs() if options.quick else all_runs()
    start = time.perf_counter()
    with one_thread():
        train_missing(wanted, path, workers=1 if options.quick else WORKERS)
    minutes = (time.perf_counter() - start) / 60
    kept = load_runs(path)
    results = [kept[run.key] for run in wanted]
    print(f"\n{facts_table(results)}\n\n{comparison_table(results, DENSE, MEMORY)}")
    picture = plot(results, DENSE, MEMORY, path.with_suffix(".png"))
    processor = sum(result["seconds"] for result in results) / 60
    print(f"\n{minutes:.1f} minutes now; {processor:.1f} minutes of processor time in all runs")
    print(f"{path}\n{picture}")
    return 0


def all_runs() -> list[Run]:
    """Every run of ROWS, seed by seed, so that what is missing at a break is the last seeds."""
    runs = [
        Run(name, row.layer, row.sizes, row.residual, rate, facts, seed)
        for name, row in ROWS.items()
        for seed in row.seeds
        for facts in row.facts
        for rate in row.learning_rates
    ]
    return sorted(runs, key=lambda run: run.seed)


def quick_runs() -> list[Run]:
    """Two numbers of few facts, two learning rates and one seed per row, and 30 steps."""
    runs = []
    for name, row in ROWS.items():
        for facts in (128, 512):
            for rate in row.learning_rates[:2]:
                run = Run(name, row.layer, row.sizes, row.residual, rate, facts, seed=0)
                runs.append(dataclasses.replace(run, steps=30, batch=128))
    return runs


def train_missing(runs: Sequence[Run], path: Path, workers: int) -> None:
    """Train the runs that the file at `path` does not hold with these settings.

    workers: processes of one thread each; 1 trains in this process.
    """
    kept = load_runs(path)
    missing = [run for run in runs if not _same(kept.get(run.key), run)]
    if missing:
        print(f"{len(missing)} of {len(runs)} runs to train", flush=True)
    start = time.perf_counter()
    for done, (run, result) in enumerate(_train_all(missing, workers), 1):
        save_run({**dataclasses.asdict(run), **result}, run.key, path)
        left = (time.perf_counter() - start) / done * (len(missing) - done)
        print(
            f"[{done}/{len(missing)}] {run.key}: {result['bits'] / 1000:.1f} kbit, "
            f"{100 * result['accuracy']:.1f} % right, {result['seconds']:.1f} s; "
            f"{left / 60:.1f} min left",
            flush=True,
        )


def _same(kept: dict[str, Any] | None, run: Run) -> bool:
    settings = dataclasses.asdict(run)
    return kept is not None and {name: kept.get(name) for name in settings} == settings


def _train_all(runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Runs with their results, in the order in which they finish."""
    if workers == 1:
        yield from ((run, train(run)) for run in runs)
        return
    # Forked processes may hang in the thread pool of their parent.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(train, run): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


if __name__ == "__main__":
    sys.exit(main())
