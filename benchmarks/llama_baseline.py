"""A baseline for the demo: a Llama of transformers that attends to everything, on the same task.

    python -m benchmarks.llama_baseline [--output runs/llama]

Trains a byte-level LlamaForCausalLM (0.8M parameters, full attention) on real text with pass keys,
in rows of 128, 512 and 2048 bytes, and saves it with its tokenizer, to be evaluated beside models
with a memory: python eval.py --model runs/demo,runs/llama ... A few minutes on one thread.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.attach import train_on_needles
from benchmarks.library import one_thread
from memlm.cli import run_entry_point
from memlm.data import load_tokenizer
from memlm.errors import UserError

STAGES = ((280, 128), (100, 512), (100, 2048))
TOKENS_PER_STEP = 4096
MAX_TOKENS = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save the model; returns the exit code (2 for a mistake of the user)."""
    parser = argparse.ArgumentParser(prog="benchmarks.llama_baseline")
    parser.add_argument("--output", type=Path, default=Path("runs/llama"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return run_entry_point(lambda: _train(options.output, options.seed))


def _train(folder: Path, seed: int) -> None:
    if folder.exists():
        raise UserError(f"--output: {folder} exists already; choose another folder")
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start = time.process_time()
    with one_thread():
        train_on_needles(model, STAGES, TOKENS_PER_STEP, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {time.process_time() - start:.0f} s, saved in {folder}")


if __name__ == "__main__":
    sys.exit(main())
