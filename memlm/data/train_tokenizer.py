"""Trains a tokenizer on the texts of a run: `python -m memlm.data.train_tokenizer --help`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerFast

from memlm.cli import Parser, run_entry_point
from memlm.data.command_line import add_text_options, chosen_texts
from memlm.data.config import DataConfig
from memlm.data.text_sample import TextSample, sample_sources
from memlm.data.train_sentencepiece import KINDS, fast_tokenizer, train_sentencepiece
from memlm.errors import UserError
from memlm.files import write_folder

MODEL_FILE = "sentencepiece.model"  # a name that AutoTokenizer does not take for one with U+2581
_COMPARED = 1 << 21  # bytes of the sample that both tokenizers encode before one is written
_MOST_BYTES = 1 << 30  # more takes another kind of suffix array, and hundreds of GB
_DESCRIPTION = """\
Train a SentencePiece tokenizer on texts, into a folder for AutoTokenizer and data.tokenizer.
Every text comes back from its tokens as it was: spaces, tabs, control characters, emoji. What is
no piece becomes bytes. The same texts give the same files."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the tokenizer of the command line; returns the exit code (2 for a user's mistake)."""
    return run_entry_point(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    options, overrides = _parser().parse_known_args(argv)
    if options.vocab_size < 1:
        raise UserError(f"--vocab_size must be at least 1, got {options.vocab_size}")
    if not 1 <= options.max_bytes <= _MOST_BYTES:
        raise UserError(f"--max_bytes must be between 1 and {_MOST_BYTES}, got {options.max_bytes}")
    data = chosen_texts(options, overrides, validation_fraction=0.0)
    train_tokenizer(data, options.vocab_size, options.kind, options.output, options.max_bytes)


def train_tokenizer(
    data: DataConfig, vocab_size: int, kind: str, output: Path, max_bytes: int
) -> None:
    """Train a tokenizer on the training texts of `data` and write its folder; prints what it did.

    Args:
        data: its sources; `data.tokenizer` plays no part.
        vocab_size: tokens, of which 4 are special and 256 bytes.
        kind: "unigram" or "bpe".
        output: the folder to make: tokenizer.json, tokenizer_config.json and the SentencePiece
            model, with the same ids.
        max_bytes: of text to train on, at most; shared out as `sample_sources` says.

    Raises:
        UserError: where the folder is there already, a text cannot be read, or `vocab_size` does
            not suit the texts.
    """
    _require_free(output)
    start = time.monotonic()
    samples = sample_sources(data, max_bytes)
    for sample in samples:
        print(_describe(sample))
    parts = [part for sample in samples for part in sample.parts]
    size = sum(sample.kept_bytes for sample in samples)
    model = train_sentencepiece(parts, kind, vocab_size)
    tokenizer = fast_tokenizer(model, kind)
    bytes_per_token = _compare(tokenizer, model, parts)
    _require_free(output)

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        (folder / MODEL_FILE).write_bytes(model)

    write_folder(output, write)
    print(
        f"{output}: {kind}, {len(tokenizer):,} tokens, {bytes_per_token:.2f} bytes a token; "
        f"trained on {size / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s"
    )


def _require_free(output: Path) -> None:
    if output.exists():
        raise UserError(f"--output {output}: is there already; choose another folder or delete it")


def _describe(sample: TextSample) -> str:
    read = f"{sample.read_bytes / 1e6:,.1f} MB (documents: {sample.documents:,})"
    if not sample.ended:
        return f"{sample.name}: the first {read}"
    if sample.kept_bytes < sample.read_bytes:
        return f"{sample.name}: {sample.kept_bytes / 1e6:,.1f} MB, drawn at random from {read}"
    return f"{sample.name}: all {read}"


def _compare(tokenizer: PreTrainedTokenizerFast, model: bytes, parts: Sequence[str]) -> float:
    """Bytes per token of the first parts, for which both have the same ids and lose nothing."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = tokens = 0
    for part in parts:
        ids = tokenizer(part, verbose=False)["input_ids"]
        if ids != processor.encode(part) or tokenizer.decode(ids) != part:
            raise RuntimeError(f"tokenizers and sentencepiece differ on {part!r}")
        size += len(part.encode())
        tokens += len(ids)
        if size >= _COMPARED:
            break
    return size / max(tokens, 1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m memlm.data.train_tokenizer",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_text_options(parser)
    parser.add_argument(
        "--vocab_size",
        type=int,
        required=True,
        metavar="N",
        help="tokens; 4 special ones and 256 bytes are among them",
    )
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="must not be there yet"
    )
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=100_000_000,
        metavar="N",
        help="of text to train on; of more, a sample (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
