"""Any prompt of an evaluation again: python -m memlm.evaluation.show_prompt DIR --task T ...

Prompts are not stored; each is a function of the seed, the task and its number. The text goes to
standard output, what it should be answered with to standard error, and it is checked against the
fingerprint in the records where there is one.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memlm.cli import Parser, run_entry_point
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError, nearest
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.ledger import IDENTITY, read_records
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import expand_tasks, make_task
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, PromptTask, Tools

_SEGMENT = 1 << 14


def main(argv: Sequence[str] | None = None) -> int:
    """Print a prompt; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _show(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m memlm.evaluation.show_prompt", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="the output folder of an evaluation")
    parser.add_argument("--task", required=True)
    parser.add_argument("--setting", required=True, help="a length in tokens, as in results.json")
    parser.add_argument("--trial", type=int, default=0, help="its number (default: 0)")
    parser.add_argument("--variant", default=PLAIN, choices=(PLAIN, CHANGED, ABSENT))
    parser.add_argument("--model", help="name of the model whose tokenizer counts (the first)")
    parser.add_argument("--tokenizer", help="where the model has no folder")
    return parser


def _show(options: argparse.Namespace) -> None:
    path = options.folder / IDENTITY
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{options.folder} holds no evaluation ({IDENTITY} is missing)") from error
    try:
        config = EvaluationConfig.from_dict(identity["config"])
        models = {model["name"]: model["tokenizer"] for model in identity["models"]}
        distance = identity["distance"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not of an evaluation of this version") from error
    number = _number(list(models), options.model)
    source = options.tokenizer or list(models.values())[number]
    if source is None:
        raise UserError("--tokenizer is needed: this model was evaluated from memory")
    tools = Tools(config, load_tokenizer(source), distance)
    trial = regenerate(tools, options.task, options.setting, options.trial, options.variant)
    expected = _recorded(options, number)
    if expected not in (None, trial.fingerprint()):
        raise UserError(
            f"the prompt is not the one that was evaluated (fingerprint {trial.fingerprint()} "
            f"instead of {expected}): its texts or its tokenizer have changed"
        )
    for text in _text(tools, trial):
        print(text, end="")
    print()
    about = {
        "references": [list(question.references) for question in trial.questions],
        "labels": trial.labels,
        "fingerprint": trial.fingerprint(),
        "checked": expected is not None,
    }
    print(json.dumps(about), file=sys.stderr)


def regenerate(tools: Tools, task: str, setting: str, index: int, variant: str = PLAIN) -> Trial:
    """The prompt `index` of a setting.

    Raises:
        UserError: for a task, setting or number that the evaluation does not have.
    """
    names = expand_tasks(tools.config.tasks)
    if task not in names:
        raise UserError(f"--task: {task!r} is not in this evaluation{nearest(task, names)}")
    made = make_task(task, tools)
    if not isinstance(made, PromptTask):
        raise UserError(f"--task: {task} asks for every token; it has no prompts to show")
    settings = {found.label: found for found in made.settings()}
    if setting not in settings:
        raise UserError(f"--setting: {setting!r} is none of {', '.join(settings)}")
    if not 0 <= index < settings[setting].trials:
        raise UserError(f"--trial: {index} is not in 0 .. {settings[setting].trials - 1}")
    if variant not in (PLAIN, *made.variants):
        raise UserError(f"--variant: {task} has no {variant} prompts")
    return made.trial(int(setting), index, variant)


def _number(names: list[str], name: str | None) -> int:
    if name is None:
        return 0
    if name not in names:
        raise UserError(f"--model: {name!r} is none of {', '.join(names)}{nearest(name, names)}")
    return names.index(name)


def _recorded(options: argparse.Namespace, number: int) -> str | None:
    """The fingerprint of the prompt when it was evaluated."""
    condition = "on" if options.variant == PLAIN else options.variant
    for done in read_records(options.folder):
        if (done.batch.subject, done.batch.task) != (number, options.task):
            continue
        for record in done.records:
            if (record.setting, record.trial, record.condition) == (
                options.setting,
                options.trial,
                condition,
            ):
                return record.prompt
    return None


def _text(tools: Tools, trial: Trial) -> Iterator[str]:
    for start in range(0, len(trial.context), _SEGMENT):
        yield tools.tokenizer.decode(trial.context.read(start, start + _SEGMENT).tolist())
    for question in trial.questions:
        yield tools.tokenizer.decode(question.token_ids.tolist())


if __name__ == "__main__":
    sys.exit(main())
