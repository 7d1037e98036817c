"""What a kNN cache of 1k, 4k and 16k entries is worth on long documents, behind a window of 256.

    python -m benchmarks.cache_sizes [--seeds 0 1] [--files FOLDER ...]

Two models are trained alike (steps, order of the data, optimizer, seed) on documents that go on
from row to row: one whose layers all attend to 256 bytes, and the same with a kNN cache beside its
upper layers. Both then read held-out documents from their first byte to their last. The cache model
does so with the cache off and at every size, with the same trained weights. Losses are compared
document by document.

Each run also compares bits: the logits of the cache model with its gates at zero, and those of a
model without a cache that has the rest of its weights.

The text is the running Python's standard library, or other files. Runs are stored one by one in
benchmarks/results/MACHINE/cache_sizes.json with a plot beside; what is there with the same
settings is not trained again. The models stay in runs/cache_sizes. Muon orthogonalises in float32
here, see benchmarks.titans_needles.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cache_sizes_report import BASE, CACHE, plot, tables
from benchmarks.library import one_thread
from benchmarks.runs import load_runs, save_run
from benchmarks.titans_needles import float32_muon
from memlm.config import RunConfig, TrainConfig
from memlm.data import load_tokenizer
from memlm.data.config import DataConfig
from memlm.data.corpus import build_corpus
from memlm.data.sources import stdlib_documents, text_documents
from memlm.errors import UserError
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.loading import load_model
from memlm.evaluation.runner import batches
from memlm.evaluation.scoring import pad_documents, score_targets
from memlm.evaluation.subject import MemorySubject
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training import Trainer

KINDS = (BASE, CACHE)
SIZES = (0, 1024, 4096, 16384)  # entries of the cache; 0 = off
EDGES = (0, 1024, 4096, 16384)  # positions at which a part of a document begins
READ = 1024  # bytes of one call while documents are read


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of model, training and evaluation; the same for both kinds of model.

    Attributes:
        hidden_size, layers, window: of the model.
        cache_layers: upper layers that read the cache.
        capacity: entries of the cache while the model is trained.
        steps, length, rows: of training; a step has `rows` rows of `length` bytes.
        held_out: share of the documents that is held out.
        shortest, longest: held-out documents of fewer bytes are not read, of more are cut.
    """

    hidden_size: int = 96
    layers: int = 3
    window: int = 256
    cache_layers: int = 2
    capacity: int = 16384
    steps: int = 1000
    length: int = 512
    rows: int = 4
    held_out: float = 0.15
    shortest: int = 20000
    longest: int = 32768


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    """Train and evaluate what is missing and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.cache_sizes")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--files", nargs="+", metavar="PATH", help="text, folders or globs")
    parser.add_argument("--runs", type=Path, default=Path("runs/cache_sizes"))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    settings = settings or Settings()
    name = "cache_sizes_files.json" if options.files else "cache_sizes.json"
    path = options.output / report.machine_name() / name
    with one_thread():
        for seed in options.seeds:
            for kind in KINDS:
                run(kind, seed, settings, options.files, options.runs, path)
    runs = load_runs(path)
    plot(runs, path.with_suffix(".png"))
    print(f"\n{tables(runs)}\n\n{path}")
    return 0


def run(
    kind: str, seed: int, settings: Settings, files: list[str] | None, folder: Path, path: Path
) -> None:
    """Train and evaluate one model, unless the file at `path` holds it with these settings."""
    given = {**dataclasses.asdict(settings), "files": files, "seed": seed}
    key = f"{kind}, seed {seed}"
    if load_runs(path).get(key, {}).get("settings") == given:
        return
    config = run_config(kind, seed, settings, files)
    config.train.output_dir = str(folder / f"{kind.replace(' ', '_')}-{seed}-{int(time.time())}")
    start = time.process_time()
    with float32_muon():
        trainer = Trainer(config)
        summary = trainer.run()
    seconds = time.process_time() - start
    documents = long_documents(settings, files)
    model = load_model(str(summary.output_dir))
    found: dict[str, Any] = {}
    for size in SIZES if kind == CACHE else (0,):
        found[str(size)] = read_documents(with_capacity(model, size), documents, size > 0)
        bits = np.mean(found[str(size)]["bits_per_byte"])
        print(f"{key}: cache {size}, {bits:.4f} bits per byte", flush=True)
    result = {
        "kind": kind,
        "seed": seed,
        "settings": given,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            "bytes": settings.steps * settings.length * settings.rows,
            "processor_seconds": seconds,
            "loss": summary.loss,
        },
        "documents": [len(document) for document in documents],
        "sizes": found,
    }
    if kind == CACHE:
        result["zero_gates_give_the_base"] = same_logits(
            with_zero_gates(model), without_cache(model), documents[0]
        )
    save_run(result, key, path)


def layer_patterns(kind: str, settings: Settings) -> list[dict[str, Any]]:
    """`layers` of the model."""
    mixer = {"type": "sliding_attention", "window": settings.window, "num_heads": 2}
    plain = {"mixer": mixer, "ffn": "swiglu"}
    if kind == BASE:
        return [{"repeat": settings.layers, **plain}]
    memory = {
        "type": "knn_cache",
        "capacity": settings.capacity,
        "segment": settings.window // 4,
        "key_size": settings.hidden_size // 4,
        "num_heads": 2,
        "share": "cache",
    }
    return [
        {"repeat": settings.layers - settings.cache_layers, **plain},
        {"repeat": settings.cache_layers, **plain, "memory": memory},
    ]


def run_config(kind: str, seed: int, settings: Settings, files: list[str] | None) -> RunConfig:
    """The training of one model."""
    return RunConfig(
        name="cache_sizes",
        model={
            "vocab_size": 259,
            "hidden_size": settings.hidden_size,
            "intermediate_size": 3 * settings.hidden_size,
            "layers": layer_patterns(kind, settings),
        },
        data=DataConfig(
            sources=[{"type": "text", "files": files} if files else {"type": "stdlib"}],
            seed=seed,
            validation_fraction=settings.held_out,
            carry=True,
        ),
        train=TrainConfig(
            seed=seed,
            steps=settings.steps,
            length=settings.length,
            tokens_per_step=settings.rows * settings.length,
            carry_state=True,
            optimizer="muon",
            learning_rate=5e-3,
            muon_learning_rate=3e-2,
            warmup_steps=20,
            evaluation_rows=0,
            save_every=0,
        ),
    )


def long_documents(settings: Settings, files: list[str] | None) -> list[np.ndarray]:
    """Held-out documents of at least `shortest` bytes, int64, cut at `longest`, shortest first.

    Raises:
        UserError: when there are fewer than two.
    """
    texts = text_documents(files) if files else stdlib_documents()
    corpus = build_corpus(texts, load_tokenizer("bytes"), "validation", settings.held_out)
    lengths = corpus.lengths
    chosen = np.flatnonzero(lengths >= settings.shortest)
    if len(chosen) < 2:
        raise UserError(
            f"cache_sizes: {len(chosen)} held-out documents have {settings.shortest} bytes; "
            "two or more are needed"
        )
    documents = [
        corpus.tokens[corpus.starts[index] :][: min(lengths[index], settings.longest)]
        for index in chosen
    ]
    return [document.astype(np.int64) for document in sorted(documents, key=len)]


def with_capacity(model: MemLMForCausalLM, entries: int) -> MemLMForCausalLM:
    """The same weights with caches of so many entries; 0 leaves the model as it is."""
    if entries == 0:
        return model
    config = copy.deepcopy(model.config)
    for pattern in config.layers:
        if "memory" in pattern:
            pattern["memory"]["capacity"] = entries
    return _same_weights(config, model)


def with_zero_gates(model: MemLMForCausalLM) -> MemLMForCausalLM:
    """The same weights, but the gates of the memories are zero."""
    twin = _same_weights(model.config, model)
    for name, parameter in twin.named_parameters():
        if name.endswith("memory.gate"):
            parameter.data.zero_()
    return twin


def without_cache(model: MemLMForCausalLM) -> MemLMForCausalLM:
    """The same weights in a model that has no cache."""
    config = copy.deepcopy(model.config)
    for pattern in config.layers:
        pattern.pop("memory", None)
    return _same_weights(config, model)


@torch.no_grad()
def same_logits(first: MemLMForCausalLM, second: MemLMForCausalLM, document: np.ndarray) -> bool:
    """Whether both give the same bits for the beginning of a document, read call by call."""
    states: list[Any] = [None, None]
    for tokens in torch.from_numpy(document[None, : 4 * READ]).split(READ, dim=1):
        outputs = [
            model(input_ids=tokens, memory_states=state, return_memory_states=True)
            for model, state in zip((first, second), states, strict=True)
        ]
        if not torch.equal(outputs[0].logits, outputs[1].logits):
            return False
        states = [output.memory_states for output in outputs]
    return True


def _same_weights(config: MemLMConfig, model: MemLMForCausalLM) -> MemLMForCausalLM:
    """A new model with the weights of `model` that it has a place for."""
    twin = MemLMForCausalLM(copy.deepcopy(config)).eval()
    missing = twin.load_state_dict(model.state_dict(), strict=False).missing_keys
    if missing:
        raise AssertionError(f"the model has no {missing[0]}")
    return twin


@torch.no_grad()
def read_documents(
    model: MemLMForCausalLM, documents: Sequence[np.ndarray], use_memory: bool
) -> dict[str, Any]:
    """Score every byte but the first of each document, with states carried from call to call.

    Returns:
        bits_per_byte of each document, by_position their means over the bytes between EDGES,
        perplexity over all bytes, state_bytes of a row, processor seconds.
    """
    start = time.process_time()
    subject = MemorySubject(model, None, make_plan(model), READ)
    losses: list[Tensor] = []
    for rows in batches(len(documents), 8):
        batch = [documents[row] for row in rows]
        states, parts = None, []
        for inputs, targets in zip(
            *(tensor.split(READ, dim=1) for tensor in pad_documents(batch)), strict=True
        ):
            found, states = score_targets(subject, inputs, targets, states, use_memory)
            parts.append(found)
        joined = torch.cat(parts, 1).double()
        losses += [row[: len(document) - 1] for row, document in zip(joined, batch, strict=True)]
    every = torch.cat(losses)
    by_position = {}
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        here = torch.cat([loss[low:high] for loss in losses])
        if len(here):
            by_position[str(low)] = float(here.mean()) / math.log(2)
    return {
        "bits_per_byte": [float(loss.mean()) / math.log(2) for loss in losses],
        "by_position": by_position,
        "perplexity": math.exp(float(every.mean())),
        "state_bytes": subject.state_bytes(states).memory if use_memory else 0,
        "processor_seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    sys.exit(main())
