"""`make demo`: train a small model with a memory, then look for needles out of attention's reach.

    python -m memlm.demo [--config configs/demo.yaml] [--train.seed 1 ...]

The run folder gets the model, its metrics, an evaluation with a report, and results.json with the
numbers of the table printed at the end.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlm.cli import Parser, run_entry_point
from memlm.config import RunConfig, load_config
from memlm.errors import UserError
from memlm.evaluation import evaluate
from memlm.evaluation.report.shape import PROMPT_CONDITIONS
from memlm.models.card import write_run_card
from memlm.training import Trainer

RESULTS = "results.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry_point(lambda: _demo(words))


def _demo(words: list[str]) -> None:
    parser = Parser(prog="python -m memlm.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    options, overrides = parser.parse_known_args(words)
    config = load_config(options.config, overrides)
    if config.evaluate is None or "needle" not in config.evaluate.tasks:
        raise UserError(f"{options.config}: the demo needs an evaluate section with task needle")
    if config.train.output_dir is None:
        config.train.output_dir = str(_free_folder(config.output_dir))
    command = shlex.join(["python", "-m", "memlm.demo", *words])
    results = run_demo(config, command)
    print(format_results(results))


def _free_folder(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3 ... when an earlier demo is there."""
    choice, number = folder, 1
    while choice.exists():
        number += 1
        choice = folder.with_name(f"{folder.name}-{number}")
    return choice


def run_demo(config: RunConfig, command: str | None = None) -> dict[str, Any]:
    """Train and evaluate as `config` says, and write results.json into the run folder.

    Args:
        config: a run with held-out rows and a needle task.
        command: the command that repeats it, for the report.

    Returns:
        What results.json holds: {"needle": {length: {condition: recall in [0, 1]}},
        "needle_intervals": {length: {condition: [low, high]}}, "bits_per_byte": {"before",
        "after", "after_memory_off"}, "seconds": {"training", "total"}, ...}.
    """
    start = time.perf_counter()
    trainer = Trainer(config)
    summary = trainer.run()
    without_memory = trainer.evaluate(use_memory=False)
    folder = summary.output_dir
    evaluation = evaluate(
        trainer.model,
        trainer.tokenizer,
        config.evaluate,
        folder / "evaluation",
        command=command,
        name=folder.name,
    )
    judged = evaluation["runs"][0]
    needle = judged["tasks"]["needle"]
    results = {
        "needle": _by_condition(needle, lambda score: score["value"]),
        "needle_intervals": _by_condition(needle, lambda score: [score["low"], score["high"]]),
        "trials_per_length": config.evaluate.trials,
        "least_distance_tokens": needle["least_distance_tokens"],
        "bits_per_byte": {
            "before": summary.before["bits_per_byte"],
            "after": summary.after["bits_per_byte"],
            "after_memory_off": without_memory["bits_per_byte"],
        },
        "training_tokens_per_second": summary.tokens_per_second,
        "cost": needle["cost"][str(max(config.evaluate.all_lengths))],
        "parameters": judged["model"]["parameters"],
        "seed": config.train.seed,
        "seconds": {"training": summary.seconds, "total": time.perf_counter() - start},
        "report": str(folder / "evaluation" / "report.html"),
        "command": command,
        "versions": evaluation["versions"],
    }
    path = folder / RESULTS
    unfinished = path.with_suffix(".json.new")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    write_run_card(folder)
    return results


def _by_condition(task: dict[str, Any], pick) -> dict[str, dict[str, Any]]:
    return {
        length: {condition: pick(score) for condition, score in scores.items()}
        for length, scores in task["scores"].items()
    }


def format_results(results: dict[str, Any]) -> str:
    """The demo's numbers as a page of plain text."""
    bits, seconds, cost = results["bits_per_byte"], results["seconds"], results["cost"]
    conditions = list(next(iter(results["needle"].values())))
    headings = [
        f"{name} prompt" if name in PROMPT_CONDITIONS else f"memory {name}" for name in conditions
    ]
    lines = [
        "",
        f"Needles in real text, recall in % with 95 % interval "
        f"({results['trials_per_length']} trials per length, the needle at least "
        f"{results['least_distance_tokens']} tokens before the question)",
        "",
        "tokens  " + "".join(f"{heading:>22}" for heading in headings),
    ]
    for length, recalls in results["needle"].items():
        cells = []
        for name in conditions:
            low, high = results["needle_intervals"][length][name]
            cells.append(f"{100 * recalls[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"{length:>6}  " + "".join(f"{cell:>22}" for cell in cells))
    lines += [
        "",
        f"bits per byte   {bits['before']:.2f} before training, {bits['after']:.2f} after, "
        f"{bits['after_memory_off']:.2f} after with the memory off",
        f"speed           {results['training_tokens_per_second']:,.0f} tokens/s in training, "
        f"{cost['read_tokens_per_second']:,.0f} tokens/s reading",
        f"state           {cost['memory_state_bytes']:,.0f} bytes of memory per row, "
        f"{cost['state_bytes']:,.0f} with the attention's window, at any length",
        f"time            {seconds['training']:.0f} s training, {seconds['total']:.0f} s in all",
        f"report          {results['report']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
