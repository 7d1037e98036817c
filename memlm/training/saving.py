"""What a run writes: its checkpoints and its model; and how it goes on from a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from memlm.errors import UserError
from memlm.files import disk_errors, write_folder
from memlm.training import checkpoint as checkpoints
from memlm.training.dead_keys import save_key_reads
from memlm.training.lanes import save_states
from memlm.training.retention import FOLDER, checkpoint_path, keep_latest
from memlm.training.schedule import CurriculumState
from memlm.training.together import on_main

if TYPE_CHECKING:
    from memlm.training.trainer import Trainer


def save_checkpoint(run: "Trainer") -> Path:
    """Write the checkpoint of the run's current step and delete old ones; collective.

    Returns:
        Its folder.

    Raises:
        UserError: on every process, when the disk is full or refuses.
    """
    state = checkpoints.RunState(
        step=run.step,
        data_index=run.step * run.feed.rows,
        stage=run.curriculum.stage,
        answer_bits=run.curriculum.answer_bits,
        before=run.before,
        seconds=run.seconds,
        config=run.config.to_dict(),
        evaluation_due=run.evaluation_due,
        skipped_steps=run.guard.skipped,
        skipped_in_a_row=run.guard.in_a_row,
    )
    # Collective calls: every process takes part, the first one writes.
    run.average_statistics()
    weights = checkpoints.whole_weights(run.model)
    optimizer = checkpoints.optimizer_tensors(run.optimizers, run.model)
    lanes, key_reads = run.lanes.gather(), run.dead_keys.gathered()

    def write(folder: Path) -> None:
        _write_model(run, folder, weights)
        save_file(optimizer, folder / checkpoints.OPTIMIZER_FILE)
        save_states(lanes, folder)
        save_key_reads(key_reads, folder)
        checkpoints.write_state(folder, state)

    target = checkpoint_path(run.folder, run.step)

    def replace() -> None:
        checkpoints.write_checkpoint(target, write)
        keep_latest(run.folder, run.options.keep_checkpoints, run.options.keep_every)

    on_main(run.accelerator, replace)
    return target


def save_model(run: "Trainer") -> None:
    """Put the model beside the metrics, so that the run folder loads as a model; collective.

    Raises:
        UserError: on every process, when the disk is full or refuses.
    """
    run.average_statistics()
    weights = checkpoints.whole_weights(run.model)
    finished = run.folder / FOLDER / "final"

    def replace() -> None:
        write_folder(finished, lambda new: _write_model(run, new, weights))
        with disk_errors(run.folder):
            for path in finished.iterdir():
                path.replace(run.folder / path.name)
            finished.rmdir()

    on_main(run.accelerator, replace)


def _write_model(run: "Trainer", folder: Path, weights: dict[str, Tensor] | None) -> None:
    shown = is_progress_bar_enabled()
    disable_progress_bar()  # its bar would break the run's own
    try:
        run.model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)
    finally:
        if shown:
            enable_progress_bar()


def restore(run: "Trainer", source: Path) -> None:
    """Put a new run, whose model has the weights of `source` already, where that checkpoint is.

    Raises:
        UserError: for a checkpoint that does not fit the run.
    """
    state = checkpoints.read_state(source)
    run.evaluation_due = state.evaluation_due
    run.step, run.before, run.seconds = state.step, state.before, state.seconds
    run.guard.skipped, run.guard.in_a_row = state.skipped_steps, state.skipped_in_a_row
    if state.stage >= len(run.stages):
        raise UserError(
            f"{source}: it is in stage {state.stage + 1} of its curriculum, but the config "
            f"has {len(run.stages)}"
        )
    run.curriculum = CurriculumState(state.stage, state.answer_bits)
    run.start_stage()
    checkpoints.load_optimizers(source, run.optimizers, run.model)
    run.dead_keys.load(source, run.step)
    if run.options.carry_state:
        run.lanes.load(source, run.model.init_states(1), run.accelerator.device)
