"""Needles learned up to 2048 tokens, looked for up to 8192: Titans' memories behind a short window.

    python -m benchmarks.titans_needles [--variants lmm mac ...] [--seeds 0 1 2]

Every run trains the model of a preset of configs/titans_needle.yaml with the demo's curriculum and
asks for pass keys out of attention's reach, with the memory on, off, reset and swapped. Then it
reads 65,536 tokens: the bytes of its state and the time per 8192 tokens must not grow. Runs are
stored one by one in benchmarks/results/MACHINE/titans_needles.json; what is there with the same
config is not trained again. The models stay in runs/titans_needle.

Muon orthogonalises in float32 here, not in bfloat16 as torch has it: that is 25 times as fast on a
CPU without bfloat16 units, where it would take half of the training.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.library import one_thread
from benchmarks.runs import Runs, load_runs, save_run
from memlm.config import load_config
from memlm.data import load_tokenizer
from memlm.demo import run_demo
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.haystack import held_out_corpus
from memlm.evaluation.loading import load_model
from memlm.evaluation.subject import MemorySubject

CONFIG = Path("configs/titans_needle.yaml")
VARIANTS = ("lmm", "mac", "mag", "window")  # presets of CONFIG; lmm is the config as it stands
STREAM_TOKENS, STREAM_PART = 65536, 8192


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and evaluate what is missing and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.titans_needles")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--runs", type=Path, default=Path("runs/titans_needle"))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    path = options.output / report.machine_name() / "titans_needles.json"
    with one_thread():
        for seed in options.seeds:
            for variant in options.variants:
                run(variant, seed, options.config, options.runs, path)
    print(f"\n{recall_table(load_runs(path))}\n\n{stream_table(load_runs(path))}\n\n{path}")
    return 0


def run(variant: str, seed: int, config_path: Path, folder: Path, path: Path) -> None:
    """Train and evaluate one model, unless the file at `path` holds it with this config."""
    preset = None if variant == "lmm" else variant
    config = load_config(
        config_path, [f"--train.seed={seed}", f"--data.seed={seed}"], preset=preset
    )
    sections = config.to_dict()
    key = f"{variant}, seed {seed}"
    if load_runs(path).get(key, {}).get("config") == sections:
        return
    config.train.output_dir = str(_free(folder / f"{variant}-{seed}"))
    with float32_muon():
        results = run_demo(config, "python -m benchmarks.titans_needles")
    del results["report"]  # its place on this machine
    model = load_model(config.train.output_dir)
    text = held_out_corpus(load_tokenizer(config.data.tokenizer), config.evaluate.haystack)
    tokens = torch.from_numpy(text.tokens.astype("int64"))
    stream = measure_stream(model, tokens, STREAM_TOKENS, STREAM_PART)
    found = {"variant": variant, "seed": seed, **results, "stream": stream, "config": sections}
    save_run(found, key, path)
    recalls = [f"{100 * scores['on']:.1f} % at {n}" for n, scores in results["needle"].items()]
    print(f"{key}: {', '.join(recalls)}, {results['seconds']['total']:.0f} s", flush=True)


@contextlib.contextmanager
def float32_muon() -> Iterator[None]:
    """Let torch.optim.Muon orthogonalise in the gradient's own precision."""
    from torch.optim import _muon

    original = _muon._zeropower_via_newtonschulz
    _muon._zeropower_via_newtonschulz = newton_schulz
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = original


def newton_schulz(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """U V^T, approximately, of a gradient U S V^T: all singular values come near 1.

    Muon's quintic iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` (Jordan et al., 2024).
    """
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.mT if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _free(folder: Path) -> Path:
    """`folder`, or the first of folder.2, folder.3 ... that does not exist."""
    number, choice = 1, folder
    while choice.exists():
        number += 1
        choice = folder.with_name(f"{folder.name}.{number}")
    return choice


def measure_stream(
    model: nn.Module, text: torch.Tensor, tokens: int, part: int, segment: int = 256
) -> dict[str, list[float]]:
    """Read `tokens` tokens as one row: text (int64 [length]) again and again, in segments.

    Returns:
        Per part of `part` tokens: {"tokens": read so far, "seconds": processor time of the part,
        "state_bytes": after it, "memory_state_bytes": of the memories alone}.
    """
    text = text.repeat(-(-tokens // len(text)))[None, :tokens]
    found = {key: [] for key in ("tokens", "seconds", "state_bytes", "memory_state_bytes")}
    subject = MemorySubject(model, None, make_plan(model), segment)
    states, start, read = None, time.process_time(), 0
    for piece in text.split(segment, dim=1):
        with torch.no_grad():
            states = subject.read(piece, None, states, use_memory=True)
        read += piece.shape[1]
        if read % part == 0:
            sizes = subject.state_bytes(states)
            found["tokens"].append(read)
            found["seconds"].append(time.process_time() - start)
            found["state_bytes"].append(sizes.total)
            found["memory_state_bytes"].append(sizes.memory)
            start = time.process_time()
    return found


def recall_table(runs: Runs) -> str:
    """Recall in % per run, length and condition; `-` where a condition does not apply."""
    lengths = sorted({int(length) for found in runs.values() for length in found["needle"]})
    lines = []
    for found in _in_order(runs):
        cells = [_recalls(found["needle"].get(str(length))) for length in lengths]
        lines.append(
            [
                found["variant"],
                found["seed"],
                *cells,
                int(found["cost"]["memory_state_bytes"]),
                int(found["cost"]["state_bytes"]),
                round(found["training_tokens_per_second"]),
                round(found["cost"]["read_tokens_per_second"]),
            ]
        )
    header = (
        "variant",
        "seed",
        *(f"{length}: on / off / reset / swapped" for length in lengths),
        "memory bytes",
        "state bytes",
        "training tokens/s",
        "reading tokens/s",
    )
    return report.table(header, lines)


def _recalls(by_condition: dict[str, float] | None) -> str | None:
    if by_condition is None:
        return None
    names = ("on", "off", "reset", "swapped")
    values = [by_condition.get(name) for name in names]
    return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def stream_table(runs: Runs) -> str:
    """Bytes of the state and processor time per part of the stream, a line per run."""
    lines = []
    for found in _in_order(runs):
        stream = found["stream"]
        times = stream["seconds"]
        lines.append(
            [
                found["variant"],
                found["seed"],
                stream["tokens"][-1],
                stream["state_bytes"][0],
                stream["state_bytes"][-1],
                times[0],
                times[-1],
                max(times) / min(times),
            ]
        )
    header = (
        "variant",
        "seed",
        "tokens read",
        "state bytes, first part",
        "last part",
        "seconds, first part",
        "last part",
        "slowest / fastest",
    )
    return report.table(header, lines)


def _in_order(runs: Runs) -> list[dict[str, Any]]:
    return sorted(runs.values(), key=lambda run: (VARIANTS.index(run["variant"]), run["seed"]))


if __name__ == "__main__":
    sys.exit(main())
