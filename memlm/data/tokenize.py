"""Prepares the shards of a run beforehand: `python -m memlm.data.tokenize --help`."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from memlm.cli import Parser, run_entry_point
from memlm.data.command_line import add_text_options, chosen_texts
from memlm.data.config import DataConfig
from memlm.data.corpus import SPLITS
from memlm.data.shard_manifest import read_manifest
from memlm.data.shards import prepare_shards, read_shards
from memlm.data.text_origin import text_origin
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError

_DESCRIPTION = """\
Tokenise texts into the shards that data.shards of a run config names. Killed and started again, it
goes on; where the shards are there already, they are compared with their source and verified."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the shards of the command line; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    options, overrides = _parser().parse_known_args(argv)
    data = _data(options, overrides)
    if data.shards is None:
        raise UserError("data.shards: no folder is given; set it in the config or by --out")
    make_shards(data)


def _data(options: argparse.Namespace, overrides: Sequence[str]) -> DataConfig:
    fraction = options.validation_fraction
    if fraction is None:
        fraction = DataConfig.validation_fraction
    elif options.config is not None:
        raise UserError("--validation-fraction goes with --text; the config has its own")
    data = chosen_texts(options, overrides, fraction)
    given = {
        "tokenizer": options.tokenizer,
        "shards": options.out,
        "tokenize_processes": options.processes,
    }
    return dataclasses.replace(data, **{k: v for k, v in given.items() if v is not None})


def make_shards(data: DataConfig) -> None:
    """Make and verify the shards of all sources that are not streamed; prints a line for each.

    Raises:
        UserError: as `prepare_shards` and `read_shards`, and when no source has texts to tokenise.
    """
    sources = data.parsed_sources()
    origins = list(dict.fromkeys(origin for s in sources if (origin := text_origin(s))))
    if not origins:
        raise UserError("data.sources: no source has texts to tokenise (streams have none)")
    tokenizer = load_tokenizer(data.tokenizer)
    splits = SPLITS if data.validation_fraction else SPLITS[:1]
    for origin in origins:
        start = time.monotonic()
        folder = prepare_shards(
            data.shards, origin, tokenizer, data.validation_fraction, data.tokenize_processes
        )
        for split in splits:
            read_shards(folder, split)
        content = read_manifest(folder)["splits"]
        sizes = ", ".join(
            f"{split} {content[split]['documents']:,} documents of {content[split]['tokens']:,} "
            "tokens"
            for split in splits
        )
        print(f"{folder}: {sizes}; made or verified in {time.monotonic() - start:.1f} s")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m memlm.data.tokenize",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_text_options(parser)
    parser.add_argument("--tokenizer", metavar="NAME", help="as data.tokenizer; default: bytes")
    parser.add_argument("--out", metavar="FOLDER", help="as data.shards")
    parser.add_argument("--processes", type=int, metavar="N", help="as data.tokenize_processes")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="X",
        help=f"as data.validation_fraction, with --text; default: {DataConfig.validation_fraction}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
