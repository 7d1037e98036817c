"""Throughput of making shards, next to datasets.map; and what a kill half-way leaves.

python -m benchmarks.tokenize_text

The text is the standard library of the running Python with its tests, one document per file, in
one jsonl file. Both sides have the same tokenizer and number of processes, take turns, and their
tokens are compared. What is timed: of datasets.map, the call alone, on a dataset that is in Arrow
form already; of the shards, all of `prepare_shards`: reading the jsonl file twice, hashing, the
split, tokenising, writing through to the disk (fsync). The ratio is the median over the turns.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Both sides get their processes from the argument alone.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import numpy as np
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import report
from benchmarks.library import positive
from memlm.data.config import TextSource
from memlm.data.shard_manifest import read_manifest
from memlm.data.shards import prepare_shards, read_shards
from memlm.data.text_origin import TextOrigin, text_origin
from memlm.data.tokenizers import load_tokenizer

NEEDED = 0.9  # of the throughput of datasets.map
VOCABULARY = 8192
KINDS = ("bpe", "sentencepiece", "bytes")
_TRAINING_BYTES = 2_000_000  # of text that the tokenizers are made from


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; 1 where tokens differ or the shards are slower than needed."""
    parser = argparse.ArgumentParser(prog="benchmarks.tokenize_text")
    parser.add_argument("--megabytes", type=positive, default=30, help="of text")
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--tokenizers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memlm-tokenize-") as name:
        folder = Path(name)
        texts = write_texts(folder / "text.jsonl", options.megabytes * 10**6)
        print(f"{len(texts)} documents, {(folder / 'text.jsonl').stat().st_size:,} bytes of jsonl")
        specs = {kind: make_tokenizer(kind, texts, folder) for kind in options.tokenizers}
        results = {}
        for kind, spec in specs.items():
            results[kind] = compare(spec, folder, options.processes, options.repeats)
            print(table({kind: results[kind]}), flush=True)
        first = next(iter(specs.values()))
        interrupted = kill_half_way(first, folder, options.processes)
    print(f"\n{table(results)}\n\nkilled half-way: {json.dumps(interrupted)}")
    found = {
        "machine": report.machine(),
        "datasets": datasets.__version__,
        "documents": len(texts),
        "processes": options.processes,
        "needed": NEEDED,
        "tokenizers": results,
        "killed_half_way": interrupted,
    }
    path = options.output / report.machine_name() / "tokenize_text.json"
    print(report.save_json(found, path))
    fine = all(entry["equal"] and entry["ratio"] >= NEEDED for entry in results.values())
    return 0 if fine and interrupted["identical"] else 1


def write_texts(path: Path, size: int) -> list[str]:
    """About `size` bytes of Python sources into a jsonl file; returns the documents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, total = [], 0
    while total < size:
        for file in sorted(root.rglob("*.py")):
            text = file.read_bytes().decode("utf-8", errors="replace")
            if "site-packages" in file.parts or not text.strip():
                continue
            texts.append(text)
            total += len(text.encode())
            if total >= size:
                break
    lines = (json.dumps({"text": text}) for text in texts)
    path.write_text("\n".join(lines), encoding="utf-8")
    return texts


def make_tokenizer(kind: str, texts: Sequence[str], folder: Path) -> str:
    """A tokenizer trained on the beginning of the text, as `data.tokenizer` names it."""
    if kind == "bytes":
        return kind
    sample, total = [], 0
    for text in texts:
        sample.append(text)
        total += len(text)
        if total > _TRAINING_BYTES:
            break
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(sample, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        fast.save_pretrained(folder / kind)
        return str(folder / kind)
    lines = [line for text in sample for line in text.splitlines() if line.strip()]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / kind),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return f"{folder / kind}.model"


def compare(spec: str, folder: Path, processes: int, repeats: int) -> dict[str, Any]:
    """Seconds of both sides in turns, bytes and tokens, and whether the tokens are the same."""
    path = folder / "text.jsonl"
    tokenizer = load_tokenizer(spec)
    datasets.disable_progress_bars()
    dataset = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / "cache")
    )
    size = sum(len(text.encode()) for text in dataset["text"])

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {"input_ids": encoded["input_ids"]}

    def run_map() -> datasets.Dataset:
        return dataset.map(
            tokenize,
            batched=True,
            num_proc=processes,
            remove_columns=dataset.column_names,
            cache_file_name=str(folder / "map.arrow"),
            load_from_cache_file=False,
        )

    def run_shards() -> Path:
        return prepare_shards(folder / "shards", _origin(path), tokenizer, 0.0, processes)

    runs = {"map": run_map, "shards": run_shards}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    made: dict[str, Any] = {}
    for number in range(repeats):
        # Who comes second may find the processor warmer; so they change places.
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            if name == "shards":
                shutil.rmtree(folder / "shards", ignore_errors=True)
            start = time.monotonic()
            made[name] = runs[name]()
            seconds[name].append(time.monotonic() - start)
    tokens = np.asarray(read_shards(made["shards"], "train").tokens)
    chunks = made["map"].data.column("input_ids").chunks
    expected = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    ratios = [theirs / ours for theirs, ours in zip(seconds["map"], seconds["shards"], strict=True)]
    return {
        "bytes": size,
        "tokens": len(tokens),
        "seconds": seconds,
        "map_mb_per_second": size / statistics.median(seconds["map"]) / 1e6,
        "shards_mb_per_second": size / statistics.median(seconds["shards"]) / 1e6,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "equal": bool(np.array_equal(tokens, expected)),
    }


def kill_half_way(spec: str, folder: Path, processes: int) -> dict[str, Any]:
    """Kill -9 the command that makes shards, start it again, and compare with an unbroken run."""
    path, root = folder / "text.jsonl", folder / "interrupted"
    whole = prepare_shards(folder / "whole", _origin(path), load_tokenizer(spec), 0.05, processes)
    splits = read_manifest(whole)["splits"].values()
    files = sum(len(split["shards"]) for split in splits)
    command = [sys.executable, "-m", "memlm.data.tokenize", "--text", str(path)]
    command += ["--tokenizer", spec, "--out", str(root), "--processes", str(processes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(root.rglob("*.safetensors"))) < files // 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = len(list(root.rglob("*.safetensors")))
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    identical = _contents(root / whole.name) == _contents(whole)
    killed = process.returncode == -signal.SIGKILL
    return {
        "files": files,
        "files_when_killed": found,
        "identical": identical and killed and 0 < found < files,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The throughputs for a reader."""
    header = ("tokenizer", "MB", "M tokens", "map MB/s", "shards MB/s", "ratio", "same tokens")
    rows = [
        (
            kind,
            entry["bytes"] / 1e6,
            entry["tokens"] / 1e6,
            entry["map_mb_per_second"],
            entry["shards_mb_per_second"],
            entry["ratio"],
            "yes" if entry["equal"] else "NO",
        )
        for kind, entry in results.items()
    ]
    return report.table(header, rows)


def _origin(path: Path) -> TextOrigin:
    origin = text_origin(TextSource(files=[str(path)]))
    assert origin is not None
    return origin


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


if __name__ == "__main__":
    sys.exit(main())
