"""Associative memories of a model trained on bigrams: python -m memlm.evaluation.probes --model RUN

Prints a table of the probes, and writes it with all numbers and a picture of attention.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from memlm.cli import Parser, run_entry_point
from memlm.data.config import parse_generator, parse_source
from memlm.data.synthetic.bigrams import Bigrams
from memlm.errors import UserError
from memlm.evaluation.loading import load_model
from memlm.evaluation.probes.associative import probe_associations
from memlm.evaluation.probes.picture import draw_attention
from memlm.evaluation.probes.table import format_table
from memlm.files import replace_file
from memlm.yaml_tree import read_yaml

RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "associative.json", "associative.md", "attention.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Probe a model; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _probe(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m memlm.evaluation.probes", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="run folder")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--options", help="of bigrams, as YAML: {tokens: 64}; default: those of the run's source"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--rows", type=int, default=32, help="rows that are read (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (0)")
    return parser


def _probe(options: argparse.Namespace) -> None:
    path = options.output / RESULTS_FILE
    if path.exists():
        raise UserError(f"--output: {path} exists already; choose another folder")
    if options.seed < 0:
        raise UserError(f"--seed: must be >= 0, got {options.seed}")
    task = _task(options)
    model = load_model(options.model, torch.float32)
    if torch.cuda.is_available():
        model = model.to("cuda")
    probes = probe_associations(model, task, options.length, options.rows, options.seed)
    table = format_table(probes)
    print(table, end="")
    found = {
        "model": options.model,
        "options": dataclasses.asdict(task),
        "files": [str(file) for file in task.input_files()],
        "length": options.length,
        "rows": options.rows,
        "seed": options.seed,
    } | dataclasses.asdict(probes)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make {options.output} ({error.strerror})") from error
    example = task.example(options.length, np.random.default_rng(options.seed))
    replace_file(options.output / PICTURE_FILE, draw_attention(model, example.input_ids))
    replace_file(options.output / TABLE_FILE, table)
    replace_file(path, json.dumps(found, indent=1) + "\n")


def _task(options: argparse.Namespace) -> Bigrams:
    """The task with the options of the command line, or of the run's first source of it."""
    if options.options is not None:
        try:
            values = yaml.safe_load(options.options)
        except yaml.YAMLError as error:
            raise UserError(f"--options: {options.options!r} is not YAML") from error
        return parse_generator("bigrams", values, "--options")
    path = Path(options.model) / "config.yaml"
    if path.is_file():
        data = read_yaml(path).get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        for number, entry in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(entry, dict) and entry.get("type") == "bigrams":
                return parse_source(entry, f"{path}: data.sources[{number}]").generator
    raise UserError(
        f"--model: {options.model} has no config.yaml with a source of type bigrams; give the "
        "options of the task with --options, such as '{tokens: 64}'"
    )


if __name__ == "__main__":
    sys.exit(main())
