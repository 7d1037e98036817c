"""The run folder: where a run goes on from, and what is written into it when it starts."""

import sys
from pathlib import Path

from accelerate import Accelerator

from memlm.config import RunConfig, save_config
from memlm.errors import UserError
from memlm.files import disk_errors, recover
from memlm.training.checkpoint import find_checkpoint, read_state
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.provenance import STARTS_FILE, read_starts, record_start
from memlm.training.retention import FOLDER, complete_checkpoints
from memlm.training.run_lock import LOCK_FILE
from memlm.training.together import on_main

CONFIG_FILE = "config.yaml"
# What decides which rows a step has.
_ROWS = {
    "data": ("tokenizer", "sources", "seed", "validation_fraction"),
    "train": ("length", "tokens_per_step", "curriculum", "carry_state"),
}


def find_start(config: RunConfig, resume: bool | str | Path) -> Path | None:
    """The checkpoint to start from, None for a new run.

    With `resume="auto"` a run that was killed before its first checkpoint starts anew.

    Raises:
        UserError: when a new run's folder is in use, there is nothing to resume, the checkpoint
            is past the last step, or what the run has recorded cannot be read.
    """
    folder = config.output_dir
    source = _find_source(folder, resume)
    if source is not None:
        _check_state(config, source)
    read_starts(folder)
    if (folder / METRICS_FILE).exists():
        read_metrics(folder / METRICS_FILE)
    return source


def _find_source(folder: Path, resume: bool | str | Path) -> Path | None:
    source = None
    if resume == "auto":
        recover(folder / FOLDER)
        for name in (STARTS_FILE, CONFIG_FILE):
            recover(folder, name)
        if complete_checkpoints(folder):
            return find_checkpoint(None, folder)
    elif resume:
        source = find_checkpoint(None if resume is True else resume, folder)
        if source.resolve().is_relative_to(folder.resolve()):
            return source
    # A run that was killed before its first checkpoint has nothing to lose; it told of its start,
    # where a config alone may be a user's own.
    begun = (folder / STARTS_FILE).is_file() and not complete_checkpoints(folder)
    if resume and begun and not any(folder.glob("*.safetensors")):
        return source
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        what = "continue it with --resume, or choose"
        if source is not None:
            what = f"{source} is of another run, so choose"
        raise UserError(
            f"{folder}: the run folder is not empty; {what} another with --train.output_dir"
        )
    return source


def create_folder(config: RunConfig, accelerator: Accelerator, source: Path | None) -> None:
    """Create the run folder, and put the config and how the run was started into it.

    Collective; no process goes on before the folder is there.

    Args:
        config: the run.
        accelerator: its processes.
        source: the checkpoint it goes on from; None = it is new.

    Raises:
        UserError: on every process, when the folder cannot be written.
    """

    def create() -> None:
        with disk_errors(config.output_dir):
            config.output_dir.mkdir(parents=True, exist_ok=True)

    on_main(accelerator, create)
    record_start(accelerator, config.output_dir, source, config.model.get("pretrained"))
    on_main(accelerator, lambda: save_config(config, config.output_dir / CONFIG_FILE))


def _check_state(config: RunConfig, source: Path) -> None:
    """Raise UserError for a checkpoint past the last step; warn of other rows than it has seen."""
    state = read_state(source)
    if state.step > config.train.steps:
        raise UserError(
            f"train.steps: {config.train.steps}, but {source} has {state.step} behind it; resume "
            "an earlier checkpoint, or train as many at least"
        )
    sections = config.to_dict()
    for section, names in _ROWS.items():
        before = state.config.get(section) or {}
        for name in names:
            if name in before and before[name] != sections[section][name]:
                print(
                    f"warning: {section}.{name} is {sections[section][name]}, but {source} was "
                    f"trained with {before[name]}: rows may come twice or never",
                    file=sys.stderr,
                    flush=True,
                )
