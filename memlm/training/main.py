"""The command line of training: `memlm-train`, or `python train.py`."""

import argparse
import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from memlm.cli import Parser, run_entry_point
from memlm.config import RunConfig, load_config
from memlm.errors import UserError
from memlm.models.card import write_run_card
from memlm.training.interrupt import Interruption
from memlm.training.row_shares import whole_rows
from memlm.training.run_lock import RunLock
from memlm.training.setup import build_accelerator
from memlm.training.together import shared_errors
from memlm.training.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    with shared_errors():  # every process reads the same words and file
        options, overrides = _parser().parse_known_args(argv)
        config = load_config(options.config, overrides, options.preset)
        accelerator = build_accelerator(config)
    with RunLock(config.output_dir, accelerator):
        with _full_disk(config.output_dir):
            with shared_errors():  # what processes do not tell each other of, all of them find
                trainer = Trainer(config, options.resume, accelerator)
            with Interruption() as interruption:
                summary = trainer.run(interruption)
        if summary.interrupted or interruption.name is not None:
            return
        if config.evaluate is not None and accelerator.is_main_process:
            _evaluate(trainer)
        if accelerator.is_main_process:
            write_run_card(config.output_dir)


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Checkpoints and metrics say so themselves; pictures and trackers' files do not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; what was saved before is whole: make "
            "room, then go on with --resume"
        ) from error


def _evaluate(trainer: Trainer) -> None:
    from memlm.evaluation import evaluate
    from memlm.evaluation.loading import load_model

    folder = trainer.folder / "evaluation"
    model = trainer.model
    if trainer.accelerator.is_fsdp2 or trainer.options.memory_parallel > 1:
        # Its shards answer only when all processes call them; the saved model is whole.
        model = load_model(str(trainer.folder)).to(trainer.accelerator.device)
    name = trainer.folder.name
    with whole_rows(model):
        evaluate(model, trainer.tokenizer, trainer.config.evaluate, folder, name=name)
    trainer.log.line(f"evaluation in {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Train a language model with memory.",
        epilog=_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file")
    parser.add_argument("--preset", metavar="NAME", help="an entry of the file's presets")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue the run's newest whole checkpoint, or the one given; auto: the newest, or "
        "a new run where there is none",
    )
    return parser


def _keys() -> str:
    """The overrides with their defaults, for --help."""
    lines = ["Every key of the file can be given, as in --model.layers.0.memory titans:"]
    for section, values in RunConfig().to_dict().items():
        for key, value in (values or {}).items():
            lines.append(f"  --{section}.{key} (default: {value})")
    return "\n".join(lines)
