"""Needles far out of reach of a frozen model, before and after a memory is attached to it.

    python -m benchmarks.attach [--variants knn_cache gated_delta ...]

A byte-level Mistral with a short attention window is pretrained on the standard library's sources
with pass keys in them, so that it copies what its attention sees. Each variant then attaches a
memory to it, trains the memory alone (or with low-rank adapters) as the preset `tiny` of
configs/attach.yaml says, and asks for pass keys out of attention's reach with the memory on, off,
reset and swapped. Runs are stored one by one in benchmarks/results/MACHINE/attach.json; what is
there with the same config and base is not trained again. The models stay in runs/attach.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from benchmarks import report
from benchmarks.library import one_thread
from benchmarks.runs import Runs, load_runs, save_run
from benchmarks.titans_needles import float32_muon
from memlm.config import RunConfig, TrainConfig, load_config
from memlm.data import DataConfig, PackedDataset, load_tokenizer
from memlm.demo import run_demo
from memlm.evaluation import evaluate
from memlm.models.attached_files import WEIGHTS_FILE
from memlm.training.loss import group_coefficients, group_counts
from memlm.training.optimizer import build_optimizers, set_learning_rates
from memlm.training.schedule import learning_rate_factor
from memlm.training.setup import build_model

CONFIG = Path("configs/attach.yaml")
# Memories of fixed size learn to keep what a store keeps by itself: more layers, more steps.
RECURRENT = [
    "--model.attach.layers=[1, 2]",
    "--train.steps=320",
    "--train.curriculum=[{length: 128, window: 32, digits: [5, 30], until: 0.6}, "
    "{length: 256, window: 64, until: 0.8}, {length: 1024, window: 128}]",
]
VARIANTS = {
    "knn_cache": [],
    "knn_cache + LoRA": ["--model.attach.lora={r: 16, alpha: 32}"],
    "gated_delta": [
        "--model.attach.memory={type: gated_delta, num_heads: 2, head_dim: 64, dt_min: 2.0e-4, "
        "dt_max: 2.0e-4, A_min: 1.0, A_max: 1.0}",
        *RECURRENT,
    ],
    "titans": [
        "--model.attach.memory={type: titans, conv_size: 8, depth: 1, exact: true, "
        "momentum: false, num_heads: 2, chunk_size: 64, theta_max: 0.5, alpha_bias: -10.0}",
        *RECURRENT,
    ],
}


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that memories are attached to, and how it is pretrained.

    Attributes:
        hidden_size, layers, heads, window: its sizes.
        stages: (steps, tokens per row) one after the other.
        tokens_per_step: of one optimizer step.
        in_reach: tokens of the prompts that show what it can do without a memory.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    window: int = 128
    stages: tuple[tuple[int, int], ...] = ((280, 128), (100, 512))
    tokens_per_step: int = 4096
    in_reach: int = 128
    seed: int = 0


BASE = Base()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and evaluate what is missing and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.attach")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--runs", type=Path, default=Path("runs/attach"))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    path = options.output / report.machine_name() / "attach.json"
    folder = options.runs / "base"
    with one_thread():
        pretrain(BASE, folder)
        judge_base(variant_config("knn_cache", options.config, folder), BASE, folder, path)
        for name in options.variants:
            run(name, variant_config(name, options.config, folder), options.runs, path)
    print(f"\n{table(load_runs(path))}\n\n{path}")
    return 0


def pretrain(base: Base, folder: Path) -> None:
    """Train the base model and save it, unless `folder` holds it."""
    made = folder / "settings.json"
    settings = json.loads(json.dumps(dataclasses.asdict(base)))
    if made.exists() and json.loads(made.read_text(encoding="utf-8"))["settings"] == settings:
        return
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(base.seed)
    model = MistralForCausalLM(_base_config(base, tokenizer))
    train_on_needles(model, base.stages, base.tokens_per_step, base.seed)
    model.save_pretrained(folder)
    report.save_json({"settings": settings, "seconds": time.process_time() - start}, made)


def train_on_needles(
    model: PreTrainedModel, stages: Sequence[tuple[int, int]], tokens_per_step: int, seed: int
) -> None:
    """Train a byte-level model of transformers on text with pass keys.

    Args:
        model: trained in place.
        stages: (steps, tokens per row) one after the other.
        tokens_per_step: of one optimizer step.
        seed: of the rows.
    """
    model.train()
    data = DataConfig(sources=[{"type": "passkey", "digits": [5, 30]}], seed=seed)
    rows = PackedDataset(data, load_tokenizer("bytes"), "train", stages[0][1])
    options = TrainConfig(optimizer="muon", learning_rate=3e-3, weight_decay=0.01, warmup_steps=50)
    optimizers = build_optimizers(model, options)
    lengths = [length for steps, length in stages for _ in range(steps)]
    with float32_muon():
        for step, length in enumerate(lengths):
            factor = learning_rate_factor(step, len(lengths), options.warmup_steps, 0.1)
            set_learning_rates(optimizers, factor)
            count = tokens_per_step // length
            batch = rows.with_length(length).batch(range(step * count, (step + 1) * count))
            loss = pretraining_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if (step + 1) % 20 == 0:
                print(f"step {step + 1} of {len(lengths)}, loss {loss:.3f}", flush=True)


def _base_config(base: Base, tokenizer: PreTrainedTokenizerBase) -> MistralConfig:
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=base.hidden_size,
        intermediate_size=11 * base.hidden_size // 4,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.heads,
        sliding_window=base.window,
        max_position_embeddings=max(length for _, length in base.stages),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pretraining_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the text plus mean loss of the answers, in nats.

    Args:
        model: a causal language model of transformers.
        batch: int64 [B, T] input_ids, labels (shifted already) and loss_groups.
    """
    factors = group_coefficients(group_counts(batch), {"text": 1.0, "answer": 1.0})
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    losses = F.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
    return (losses * factors[batch["loss_groups"].flatten()]).sum()


def variant_config(name: str, path: Path, base: Path) -> RunConfig:
    """The run of a variant."""
    return load_config(path, [*VARIANTS[name], f"--model.pretrained={base}"], preset="tiny")


def judge_base(config: RunConfig, base: Base, folder: Path, path: Path) -> None:
    """Needles before training, in and out of reach; stored under "base".

    The memory attached is as new: the model's outputs are its own in every bit.
    """
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if load_runs(path).get("base", {}).get("settings") == settings["settings"]:
        return
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(config, tokenizer, None)
    far = dataclasses.replace(config.evaluate, tasks=["needle"])
    within = dataclasses.replace(config.evaluate.needle, distance=0)
    near = dataclasses.replace(far, lengths=[base.in_reach], needle=within)
    found = {**settings, "parameters": sum(p.numel() for p in model.parameters())}
    for key, options in (("in_reach", near), ("needle", far)):
        scores = evaluate(model, tokenizer, options)["runs"][0]["tasks"]["needle"]["scores"]
        found[key] = {length: score["off"] for length, score in scores.items()}
    save_run(found, "base", path)


def run(name: str, config: RunConfig, folder: Path, path: Path) -> None:
    """Train and evaluate one variant, unless the file at `path` holds it with this config."""
    sections = config.to_dict()
    if load_runs(path).get(name, {}).get("config") == sections:
        return
    target = folder / re.sub(r"\W+", "-", name)
    shutil.rmtree(target, ignore_errors=True)
    config.train.output_dir = str(target)
    with float32_muon():
        results = run_demo(config, "python -m benchmarks.attach")
    del results["report"]  # its place on this machine
    saved = (target / WEIGHTS_FILE).stat().st_size
    save_run({"config": sections, "saved_bytes": saved, **results}, name, path)
    recalls = [f"{100 * scores['on']:.1f} % at {n}" for n, scores in results["needle"].items()]
    print(f"{name}: {', '.join(recalls)}, {results['seconds']['total']:.0f} s", flush=True)


def table(runs: Runs) -> str:
    """Recall in % with its 95 % interval, a line per variant; the first is the base alone."""
    lengths = list(runs["base"]["needle"])
    base = [
        _recall(score["value"], (score["low"], score["high"]))
        for score in runs["base"]["needle"].values()
    ]
    lines = [["base alone", *base, None, None, None]]
    for name in VARIANTS:
        if name in runs:
            found = runs[name]
            cells = [
                " / ".join(
                    [
                        _recall(found["needle"][n]["on"], found["needle_intervals"][n]["on"]),
                        *(
                            f"{100 * found['needle'][n][c]:.1f}"
                            for c in ("off", "reset", "swapped")
                        ),
                    ]
                )
                for n in lengths
            ]
            bits = found["bits_per_byte"]
            lines.append([name, *cells, bits["before"], bits["after"], found["saved_bytes"]])
    header = (
        "memory",
        *(f"{length}: on / off / reset / swapped" for length in lengths),
        "bits per byte before",
        "after",
        "saved bytes",
    )
    return report.table(header, lines)


def _recall(value: float, bounds: Sequence[float]) -> str:
    return f"{100 * value:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
