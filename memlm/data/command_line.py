"""How a command names the texts it works on: those of a run config, or files."""

import argparse
from collections.abc import Sequence

from memlm.config import load_config
from memlm.data.config import DataConfig, TextSource
from memlm.errors import UserError


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """`--config` with `--preset`, or `--text` with `--column`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="a run config; overrides may follow")
    what.add_argument("--text", nargs="+", metavar="PATH", help="files, folders or globs")
    parser.add_argument("--preset", metavar="NAME", help="an entry of the config's presets")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help=f"of jsonl and parquet files with --text; default: {TextSource.column}",
    )


def chosen_texts(
    options: argparse.Namespace, overrides: Sequence[str], validation_fraction: float
) -> DataConfig:
    """The data of the config with its overrides, or of the files.

    Args:
        options: of a parser with `add_text_options`.
        overrides: the words that the parser does not know.
        validation_fraction: of the files.

    Raises:
        UserError: for words that only the other of `--config` and `--text` has, and as
            `load_config` does.
    """
    if options.config is not None:
        if options.column is not None:
            raise UserError("--column goes with --text; a config names the column of its sources")
        return load_config(options.config, overrides, options.preset).data
    if options.preset is not None:
        raise UserError("--preset goes with --config; with --text there is none to choose from")
    if overrides:
        raise UserError(f"unknown arguments without --config: {' '.join(overrides)}")
    source = {
        "type": "text",
        "files": options.text,
        "column": TextSource.column if options.column is None else options.column,
    }
    return DataConfig(sources=[source], validation_fraction=validation_fraction)
