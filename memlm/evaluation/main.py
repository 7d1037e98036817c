"""The command line of evaluation: `memlm-eval`, or `python eval.py`."""

import json
import shlex
import sys
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from memlm.cli import run_entry_point
from memlm.errors import UserError, nearest
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.loading import load_subject
from memlm.evaluation.processes import Processes
from memlm.evaluation.report import format_table
from memlm.evaluation.results import check_output
from memlm.evaluation.runner import evaluate_subjects

DESCRIPTION = """Measure recall and loss of models with their memories on, off, reset and swapped.
Writes records, results.json, plots (PNG) and report.html into the output folder and prints one
table. Started again with the same output folder, an evaluation that was stopped goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _evaluate(list(sys.argv[1:] if argv is None else argv)))


def _evaluate(words: list[str]) -> None:
    options, config = parse_arguments(words)
    config.validate()
    processes = Processes()
    check_output(options["output"])
    names = model_names(options["model"])
    subjects = [
        load_subject(source, options["tokenizer"], config, processes.device, name)
        for source, name in zip(options["model"], names, strict=True)
    ]
    results = evaluate_subjects(
        subjects,
        config,
        options["output"],
        command=shlex.join(["python", "eval.py", *words]),
        processes=processes,
    )
    if processes.main:
        print(format_table(results))
        print(f"\nReport: {Path(options['output']) / 'report.html'}")


def model_names(sources: Sequence[str]) -> list[str]:
    """The last parts of folders and Hub ids, numbered where two are the same.

    Raises:
        UserError: for a model that is named twice.
    """
    names: list[str] = []
    for number, source in enumerate(sources):
        if source in sources[:number]:
            raise UserError(f"--model names {source!r} twice")
        name = Path(source).resolve().name if Path(source).is_dir() else Path(source).name
        choice, same = name, 1
        while choice in names:
            same += 1
            choice = f"{name}-{same}"
        names.append(choice)
    return names


def parse_arguments(words: Sequence[str]) -> tuple[dict[str, Any], EvaluationConfig]:
    """The options model (a list), tokenizer and output, and the evaluation's config.

    Lists are written with commas, as in `--tasks needle,mqar`, or as YAML.

    Raises:
        UserError: for an unknown option (with the nearest one) or a value of the wrong type.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="eval.py", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("--model", type=list[str], help="run folders or Hub ids")
    parser.add_argument("--output", type=str, help="folder for the results")
    parser.add_argument("--tokenizer", type=str | None, help="default: those beside the models")
    for key, hint, default in _options(EvaluationConfig):
        parser.add_argument(f"--{key}", type=hint, default=default)
    hints = {key: hint for key, hint, _ in _options(EvaluationConfig)} | {"model": list[str]}
    words = _checked_words(words, hints)
    try:
        parsed = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        reason = " ".join(str(error).split()).replace('Parser key "', "--").replace('":', ":")
        raise UserError(reason) from error
    options = {name: parsed.pop(name) for name in ("model", "output", "tokenizer")}
    for name in ("model", "output"):
        if not options[name]:
            raise UserError(f"--{name} is needed: {_NEEDED[name]}")
    return options, EvaluationConfig.from_dict(parsed)


_NEEDED = {"model": "run folders or Hub ids", "output": "a folder for the results"}


def _options(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, type and default of every field."""
    defaults = config_class()
    hints = typing.get_type_hints(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint, getattr(defaults, field.name)


def _checked_words(words: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """The words as `--key=value`, with lists in brackets."""
    known = [*hints, "output", "tokenizer", "help"]
    checked = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; options look like --tasks needle")
        key, equals, value = word[2:].partition("=")
        if key not in known:
            raise UserError(f"unknown option --{key}{nearest(key, known)}")
        if key == "help":
            checked.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} needs a value")
            value = rest.pop(0)
        if typing.get_origin(hints.get(key)) is list and not value.startswith("["):
            # Quoted: on and off are words, not YAML's booleans.
            words_of_list = hints[key] == list[str]
            value = json.dumps(value.split(",")) if words_of_list else f"[{value}]"
        checked.append(f"--{key}={value}")
    return checked
