"""What a run writes: its checkpoints and its model; and how it goes on from a checkpoint."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from memlm.errors import UserError
from memlm.files import disk_errors, write_folder
from memlm.models.attached import AttachedMixin
from memlm.training import checkpoint as checkpoints
from memlm.training.dead_keys import save_key_reads
from memlm.training.lanes import save_states
from memlm.training.manifest import Entries, file_entries
from memlm.training.retention import FOLDER, checkpoint_path, keep_latest
from memlm.training.schedule import CurriculumState
from memlm.training.sharded import (
    OPTIMIZER,
    PARTS_FOLDER,
    WEIGHTS,
    first_names,
    has_parts,
    read_weights,
    write_parts,
    written_by,
)
from memlm.training.together import on_each, on_main
from memlm.training.zero2 import ShardedAdamW

if TYPE_CHECKING:
    from memlm.training.trainer import Trainer

Write = Callable[[Path], None]


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
    target = checkpoint_path(run.folder, run.step)
    # Collective calls: every process takes part, the first one writes.
    run.average_statistics()
    key_reads = run.dead_keys.gathered()
    write_tensors, known = _from_parts(run, target) if _is_sharded(run) else _from_main(run)

    def write(folder: Path) -> None:
        write_tensors(folder)
        save_key_reads(key_reads, folder)
        checkpoints.write_state(folder, state)

    def replace() -> None:
        checkpoints.write_checkpoint(target, write, known)
        keep_latest(run.folder, run.options.keep_checkpoints, run.options.keep_every)

    on_main(run.accelerator, replace)
    return target


def _is_sharded(run: "Trainer") -> bool:
    return any(isinstance(tensor, DTensor) for tensor in run.model.state_dict().values())


def _from_main(run: "Trainer") -> tuple[Write, Entries]:
    """How the main process writes model, moments and states of the lanes; collective."""
    lanes = run.lanes.gather()
    optimizer = checkpoints.optimizer_tensors(run.optimizers, run.model)

    def write(folder: Path) -> None:
        _write_model(run, folder, None)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in optimizer.items()}
        save_file(tensors, folder / checkpoints.OPTIMIZER_FILE)
        save_states(lanes, folder)

    return write, {}


def _from_parts(run: "Trainer", target: Path) -> tuple[Write, Entries]:
    """Let every process write its part of model, moments and states beside `target`; collective.

    The weights of a memory of a pretrained model are whole all the same: they are nothing without
    the fingerprint of the model, which every process has loaded whole as well.

    Returns:
        How the main process adds them to the rest, and the entries that they have in its manifest.
    """
    accelerator, mine = run.accelerator, run.accelerator.process_index
    attached = isinstance(run.model, AttachedMixin)
    place = target.with_name(f".{target.name}.parts.partial")  # `recover` deletes one that is left
    on_main(accelerator, lambda: _make_anew(place))
    tensors, weights = {}, None
    if attached:
        weights = checkpoints.whole_weights(run.model, accelerator.is_main_process)
    else:
        tensors[WEIGHTS] = first_names(run.model)
    tensors[OPTIMIZER] = checkpoints.optimizer_tensors(run.optimizers, run.model)
    lanes, own_files = run.lanes.own(), f"{mine:05d}_"

    def finish() -> Entries:
        with disk_errors(place):
            save_states(lanes, place, own_files)
            files = [*written_by(place, mine), *place.glob(f"{own_files}*")]
            entries = file_entries(place, files)
        return {f"{PARTS_FOLDER}/{name}": entry for name, entry in entries.items()}

    try:
        write_parts(place, tensors)
        found = gather_object([on_each(accelerator, finish)])
    except UserError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    known = {name: entry for part in found for name, entry in part.items()}

    def write(folder: Path) -> None:
        place.rename(folder / PARTS_FOLDER)
        if not all((folder / name).is_file() for name in known):
            raise UserError(
                f"{run.folder}: the main process does not see what others wrote there; choose a "
                "train.output_dir on a disk that all of them share"
            )
        if attached:
            _write_model(run, folder, weights)
        else:
            run.model.config.save_pretrained(folder)
            run.tokenizer.save_pretrained(folder)

    return write, known


def _make_anew(folder: Path) -> None:
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def save_model(run: "Trainer") -> None:
    """Put the model beside the metrics, so that the run folder loads as a model; collective.

    Raises:
        UserError: on every process, when the disk is full or refuses.
    """
    run.average_statistics()
    weights = checkpoints.whole_weights(run.model, run.accelerator.is_main_process)
    finished = run.folder / FOLDER / "final"

    def replace() -> None:
        write_folder(finished, lambda new: _write_model(run, new, weights))
        with disk_errors(run.folder):
            for path in finished.iterdir():
                path.replace(run.folder / path.name)
            finished.rmdir()

    on_main(run.accelerator, replace)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Those of transformers would break the run's own."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _write_model(run: "Trainer", folder: Path, weights: dict[str, Tensor] | None) -> None:
    with no_progress_bars():
        run.model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)


def restore(run: "Trainer", source: Path) -> None:
    """Put a new run where the checkpoint `source` is; collective.

    Weights that are no parts were loaded when the model was built.

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
    if has_parts(source) and not isinstance(run.model, AttachedMixin):
        read_weights(source, run.model)
        for optimizer in run.optimizers:
            if isinstance(optimizer, ShardedAdamW):
                optimizer.take_weights()
    checkpoints.load_optimizers(source, run.optimizers, run.model)
    run.dead_keys.load(source, run.step)
    if run.options.carry_state:
        run.lanes.load(source, run.model.init_states(1), run.accelerator.device)
