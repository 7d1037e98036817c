"""What each policy of `train.activations` keeps for the backward pass, and what a step then takes.

    python -m benchmarks.activations [--device cpu] [--depths 2 4 8 16] [--lengths 256 512 1024 ...]
        [--times]

A model of `BLOCK`s does one step (forward and backward pass, batch of one row of two packed
documents, float32 on a CPU and bfloat16 on a GPU) with every policy, at each depth with rows of
1024 tokens and at each length with 4 blocks. The loss has no head, so all that is kept is kept by
blocks. On a CPU bytes are those of the storages that torch's operators returned and that are alive;
what an operator needs inside of itself is not among them. On a GPU they are what its allocator
says. Bytes that `offload` policies hold in the CPU's memory are counted apart.

Gradients of each policy are compared with those of `keep`. Steps are stored one by one in
benchmarks/results/MACHINE/activations_DEVICE.json with a plot beside.
"""

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from benchmarks.library import one_thread
from benchmarks.runs import Runs, load_runs, save_run
from memlm.layers.saved_tensors import SavedOnHost
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.models.activations import set_activations, set_blockwise

BLOCK = {
    "mixer": {"type": "attention", "num_heads": 2},
    "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 32, "parallel": True},
    "ffn": "swiglu",
}
DEPTHS, LENGTHS = (2, 4, 8, 16), (256, 512, 1024, 2048, 4096)
DEPTH, LENGTH = 4, 1024
# Policy, and whether attention and feed-forward run over some tokens at a time.
WAYS = (
    ("keep", False),
    ("selective", False),
    ("recompute", False),
    ("offload", False),
    ("recompute_offload", False),
    ("keep", True),
    ("recompute", True),
)
_REORDERED = 1e-5  # relative difference of gradients whose sums are taken in another order


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model; `block_tokens` of the ways that go by blocks of tokens."""

    hidden_size: int = 64
    intermediate_size: int = 192
    block_tokens: int = 128


GPU_SIZES = Sizes(2048, 5632, 1024)


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Measure what is missing and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.activations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--times", action="store_true", help="also time a step of each")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    sizes = sizes or (Sizes() if device.type == "cpu" else GPU_SIZES)
    path = options.output / report.machine_name() / f"activations_{device.type}.json"
    cases = [(depth, LENGTH) for depth in options.depths]
    cases += [(DEPTH, length) for length in options.lengths]
    with one_thread() if device.type == "cpu" else contextlib.nullcontext():
        for depth, length in dict.fromkeys(cases):
            measure(depth, length, sizes, device, options.times, path)
    runs = load_runs(path)
    plot(runs, path.with_suffix(".png"))
    print(f"\n{tables(runs)}\n\n{path}")
    return 0


def measure(
    depth: int, length: int, sizes: Sizes, device: torch.device, timed: bool, path: Path
) -> None:
    """One step of every way, unless the file at `path` has it; with `timed`, one more for its time.

    Raises:
        AssertionError: where the gradients of a way differ from those of `keep`.
    """
    settings = {"depth": depth, "length": length, **dataclasses.asdict(sizes)}
    known, expected = load_runs(path), None
    keys = {way: f"{name(*way)}, {depth} blocks, {length} tokens" for way in WAYS}
    missing = [way for way in WAYS if known.get(keys[way], {}).get("settings") != settings]
    for way, key in keys.items():
        if not missing or (way not in missing and way != WAYS[0]):
            continue
        model = build(depth, sizes, device)
        found, gradients = step(model, *way, length, sizes.block_tokens, timed)
        expected = gradients if expected is None else expected
        difference = float((gradients - expected).norm() / expected.norm())
        # Kernels of a GPU may add in any order.
        limit = 1e-2 if device.type != "cpu" else _REORDERED if way[1] else 0
        assert difference <= limit, f"{key}: gradients differ by {difference:.2e}"
        found |= {"way": name(*way), "settings": settings, "gradient_difference": difference}
        save_run(found, key, path)
        print(f"{key}: {found['kept_bytes'] / 2**20:.1f} MiB kept", flush=True)


def name(policy: str, blocks: bool) -> str:
    """What tables call a way."""
    return f"{policy}, blockwise" if blocks else policy


def build(depth: int, sizes: Sizes, device: torch.device) -> MemLMForCausalLM:
    """A model of equal blocks with the weights of seed 0."""
    torch.manual_seed(0)
    config = MemLMConfig(
        vocab_size=256,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        layers=[{"repeat": depth, **BLOCK}],
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return MemLMForCausalLM(config).train().to(device, dtype)


def step(
    model: MemLMForCausalLM,
    policy: str,
    blocks: bool,
    length: int,
    block_tokens: int,
    timed: bool,
) -> tuple[dict[str, Any], Tensor]:
    """What one step keeps and takes, and its gradient.

    Returns:
        kept_bytes and host_bytes between forward and backward pass, peak_bytes of the step beyond
        parameters and gradients; `timed`, the seconds of a later step; and all gradients in one.
    """
    host = set_activations(model, policy)
    set_blockwise(model, block_tokens if blocks else None)
    device = model.device
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    border = length // 3
    segments = (torch.arange(length, device=device) >= border).long()[None] + 1
    positions = torch.arange(length, device=device)[None].clone()
    positions[:, border:] -= border

    def forward() -> Tensor:
        hidden, _ = model.model(ids, segment_ids=segments, position_ids=positions)
        return hidden.float().square().mean()

    for parameter in model.model.parameters():  # so that gradients have their memory
        parameter.grad = torch.zeros_like(parameter)
    watched = _watch_gpu if device.type == "cuda" else _watch_operators
    there = [*model.parameters(), *(p.grad for p in model.model.parameters()), *model.buffers()]
    with watched(host, there) as bytes_of:
        loss = forward()
        gc.collect()
        kept, held = bytes_of()[0], 0 if host is None else host.held_bytes
        loss.backward()
        peak = bytes_of()[1]
    gradients = torch.cat([p.grad.float().flatten() for p in model.model.parameters()])
    found = {"kept_bytes": kept, "host_bytes": held, "peak_bytes": peak}
    if timed:
        start = time.perf_counter()
        forward().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - start
    return found, gradients


@contextlib.contextmanager
def _watch_gpu(
    host: SavedOnHost | None, there: list[Tensor]
) -> Iterator[Callable[[], tuple[int, int]]]:
    """A function that tells the bytes allocated now and at most, beyond those at the start."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def told() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before

    yield told


@contextlib.contextmanager
def _watch_operators(
    host: SavedOnHost | None, there: list[Tensor]
) -> Iterator[Callable[[], tuple[int, int]]]:
    """As `_watch_gpu`, of the storages that operators return; those on the host are left out, and
    those of tensors that are `there` before."""
    gc.collect()
    with _Living(host, there) as living:
        yield lambda: (living.now(), living.most)


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages that operators have returned and that are alive."""

    def __init__(self, host: SavedOnHost | None, there: list[Tensor]):
        super().__init__()
        self.host, self.total, self.most = host, 0, 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in there}

    def now(self) -> int:
        """Bytes alive, without those that are held in the CPU's memory."""
        return self.total - (0 if self.host is None else self.host.held_bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in given:
                self._count(tensor.untyped_storage())
        self.most = max(self.most, self.now())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.total += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, address: int, nbytes: int) -> None:
        self._seen.discard(address)
        self.total -= nbytes


def tables(runs: Runs) -> str:
    """MiB kept, at the peak and on the host by way: over depths, then over lengths."""
    parts = []
    for what in ("depth", "length"):
        for key in ("kept_bytes", "peak_bytes", "host_bytes"):
            series = _series(runs, what, key)
            places = sorted({place for points in series.values() for place in points})
            lines = [
                [way, *(f"{points[place] / 2**20:.1f}" for place in places if place in points)]
                for way, points in series.items()
                if any(points.values())
            ]
            unit = "blocks" if what == "depth" else "tokens"
            header = (f"{key.removesuffix('_bytes')}, MiB", *(f"{x} {unit}" for x in places))
            parts.append(report.table(header, lines))
    return "\n\n".join(parts)


def plot(runs: Runs, path: Path) -> None:
    """MiB kept and at the peak, over depth and over length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    labels = {
        "kept_bytes": "MiB kept between forward and backward",
        "peak_bytes": "MiB at the peak of a step",
    }
    for row, key in zip(panels, labels, strict=True):
        for axes, what in zip(row, ("depth", "length"), strict=True):
            for way, points in _series(runs, what, key).items():
                places = sorted(points)
                style = "s--" if "blockwise" in way else "o-"
                axes.plot(places, [points[x] / 2**20 for x in places], style, label=way)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(places, [str(x) for x in places])
            fixed = f"{LENGTH} tokens" if what == "depth" else f"{DEPTH} blocks"
            axes.set(
                xlabel="blocks" if what == "depth" else "tokens per row",
                ylabel=labels[key],
                title=fixed,
            )
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(runs: Runs, what: str, key: str) -> dict[str, dict[int, float]]:
    """A number of every way over depth (at LENGTH) or over length (at DEPTH)."""
    other, value = ("length", LENGTH) if what == "depth" else ("depth", DEPTH)
    found: dict[str, dict[int, float]] = {name(*way): {} for way in WAYS}
    for run in runs.values():
        if run["settings"][other] == value:
            found[run["way"]][run["settings"][what]] = run[key]
    return found


if __name__ == "__main__":
    sys.exit(main())
