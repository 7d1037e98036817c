"""Checkpoints: what is in them, and which one a run goes on from."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from memlm.errors import UserError
from memlm.files import recover, write_folder
from memlm.memory.sharding import MEMORY, local_part, whole_table
from memlm.models import AttachConfig
from memlm.models.attached_files import is_attached, read_attached
from memlm.training.manifest import Entries, check_manifest, write_manifest
from memlm.training.retention import FOLDER, complete_checkpoints, step_of
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.sharded import OPTIMIZER, empty_part, has_parts, read_parts, stored_parts
from memlm.training.zero2 import ShardedAdamW

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_CPU = torch.device("cpu")
# What transformers adds to config.json says nothing about the shape of the weights.
_NOT_ARCHITECTURE = {"transformers_version", "architectures", "dtype", "auto_map", "use_cache"}


@dataclass
class RunState:
    """Where a run stands, besides weights, optimizer and memory states.

    Attributes:
        step: steps done.
        data_index: the global row index the next step starts at.
        stage: stage of the curriculum.
        answer_bits: recent losses of the answers (CurriculumState).
        before: the evaluation before training, if there was one.
        seconds: time spent training so far.
        config: the run config.
        evaluation_due: the run was interrupted before the evaluation of its last step.
        skipped_steps: steps that changed nothing so far (StepGuard).
        skipped_in_a_row: the last of them, back to a step that was made.

    Random numbers need no entry: those of a step are a function of (seed, step, process).
    """

    step: int
    data_index: int
    stage: int
    answer_bits: list[float]
    before: dict[str, float] | None
    seconds: float
    config: dict[str, Any]
    evaluation_due: bool = False
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def find_checkpoint(resume: str | Path | None, run: Path) -> Path:
    """The checkpoint to resume: `resume` (a checkpoint or a run folder), or the run's newest.

    Of a run, the newest that is whole: damaged ones are passed over with a warning.

    Raises:
        UserError: when there is none, or the one that was named is damaged.
    """
    place = Path(resume) if resume else run
    if not (place / FOLDER).is_dir() and ((place / STATE_FILE).is_file() or step_of(place) >= 0):
        if not place.is_dir():
            raise UserError(f"{place}: there is no such checkpoint")
        check_manifest(place)
        return place
    if place.resolve() == run.resolve():  # another run may be at work, writing a checkpoint
        recover(place / FOLDER)
    found = complete_checkpoints(place)
    for path in reversed(found):
        try:
            check_manifest(path)
            return path
        except UserError as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr, flush=True)
    if found:
        raise UserError(
            f"{place}: none of its {len(found)} checkpoints is whole (see the warnings)"
        )
    raise UserError(f"{place}: no complete checkpoint to resume from")


def write_checkpoint(
    target: Path, write: Callable[[Path], None], known: Entries | None = None
) -> None:
    """Write a checkpoint's files with `write`, then its manifest, and put it in its place.

    Args:
        target: its place.
        write: fills a folder.
        known: see `write_manifest`.

    Raises:
        UserError: when the disk is full or refuses; other checkpoints stay as they are.
    """

    def with_manifest(folder: Path) -> None:
        write(folder)
        write_manifest(folder, known)

    write_folder(target, with_manifest)


def write_state(folder: Path, state: RunState) -> None:
    """Write the run state."""
    text = json.dumps(dataclasses.asdict(state), indent=2)
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """Read the run state.

    Raises:
        UserError: for a file that is not one.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state = RunState(**values)
        if not all(type(count) is int and count >= 0 for count in (state.step, state.stage)):
            raise ValueError("step and stage are counts")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: {STATE_FILE} is not the state of a run") from error
    return state


def check_architecture(folder: Path, config: PreTrainedConfig | AttachConfig) -> None:
    """Raise UserError naming what a checkpoint's model, or attached memory, has unlike `config`."""
    attached = isinstance(config, AttachConfig)
    if is_attached(folder) != attached:
        kinds = ("a whole model", "the memory of a pretrained model")
        raise UserError(
            f"{folder}: checkpoint of {kinds[not attached]}, but the config has {kinds[attached]}"
        )
    if attached:
        saved, wanted = read_attached(folder)[0]["attach"], config.to_mapping()
        names = saved.keys() | wanted.keys()
    else:
        saved = _read_config(folder / "config.json")
        wanted = json.loads(config.to_json_string(use_diff=False))
        names = (saved.keys() & wanted.keys()) - _NOT_ARCHITECTURE
    there = _leaves({name: saved.get(name) for name in names})
    here = _leaves({name: wanted.get(name) for name in names})
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} in the config"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(f"{folder}: checkpoint of another architecture: {'; '.join(differing)}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a model") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the config of a model")
    return config


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists by dotted name."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = (_leaves(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in items)
        return {name: leaf for leaves in nested for name, leaf in leaves.items()}
    return {prefix: value}


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU."""
    if isinstance(tensor, DTensor):
        of_table = MEMORY in (tensor.device_mesh.mesh_dim_names or ())
        tensor = whole_table(tensor) if of_table else tensor.full_tensor()
    return tensor.detach().cpu()


def whole_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor] | None:
    """The weights on the CPU where the model holds shards of them, else None; collective.

    Tied weights stay one tensor.

    Args:
        model: of any kind.
        keep: False where they are not wanted: this process only gives its shards.
    """
    held = model.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) for tensor in held.values()):
        return None
    gathered = {}
    for tensor in {id(tensor): tensor for tensor in held.values()}.values():
        whole = _whole(tensor)
        if keep:
            gathered[id(tensor)] = whole
    return {name: gathered[id(tensor)] for name, tensor in held.items()} if keep else None


def optimizer_tensors(
    optimizers: Iterable[torch.optim.Optimizer], model: nn.Module
) -> dict[str, Tensor]:
    """The optimizers' state by `entry/parameter name`, as they hold it.

    Collective under ZeRO-2, where the main process alone gets the state, whole.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        zero2 = isinstance(optimizer, ShardedAdamW)
        state = optimizer.whole_state() if zero2 else optimizer.state
        for parameter, entries in state.items():
            for entry, value in entries.items():
                tensors[f"{entry}/{names[parameter]}"] = value.detach()
    return tensors


def load_optimizers(
    folder: Path, optimizers: Iterable[torch.optim.Optimizer], model: nn.Module
) -> None:
    """Give the optimizers, sharded or not, the state they were saved with; collective.

    Raises:
        UserError: when the checkpoint holds the state of other optimizers or parameters.
    """
    in_parts = has_parts(folder)
    stored = stored_parts(folder, OPTIMIZER) if in_parts else load_file(folder / OPTIMIZER_FILE)
    entries: dict[str, dict[str, Tensor | TensorStorageMetadata]] = {}
    for key, tensor in stored.items():
        entry, _, name = key.rpartition("/")
        entries.setdefault(name, {})[entry] = tensor
    parts: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    if others := entries.keys() - set(names.values()):
        raise UserError(
            f"{folder}: its optimizer state is of other parameters ({min(others)!r}); resume "
            "another checkpoint"
        )
    for optimizer in optimizers:
        wanted = _entry_of(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                saved = entries.get(names[parameter], {})
                if saved and wanted not in saved:
                    raise UserError(
                        f"{folder}: saved with another optimizer (its {names[parameter]} has "
                        f"{', '.join(saved)}); resume with the train.optimizer and "
                        "train.value_optimizer it was trained with"
                    )
                for entry, tensor in saved.items():
                    sizes = tensor.size if in_parts else tensor.shape
                    # Steps are counted on the CPU, but for a fused optimizer.
                    device = parameter.device if sizes or group.get("fused") else _CPU
                    if isinstance(optimizer, ShardedAdamW):  # whole moments may have no room there
                        device = _CPU
                    place = empty_part if in_parts else _placed
                    tensor = place(tensor, parameter, device)
                    optimizer.state[parameter][entry] = tensor
                    parts[f"{entry}/{names[parameter]}"] = tensor
    if in_parts:
        read_parts(folder, OPTIMIZER, parts)
    for optimizer in optimizers:
        if isinstance(optimizer, ShardedAdamW):
            optimizer.take_state()


def _entry_of(optimizer: torch.optim.Optimizer) -> str:
    """An entry of the state that tells this optimizer from others."""
    if isinstance(optimizer, torch.optim.Muon):
        return "momentum_buffer"
    if isinstance(optimizer, RowOptimizer) and optimizer.method == "rowwise_adagrad":
        return "square_sum"
    return "exp_avg"


def _placed(tensor: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """An entry of the state on `device`, or in the shards of its parameter if that has any."""
    if tensor.ndim and isinstance(parameter, DTensor):
        return local_part(tensor, parameter.device_mesh, parameter.placements)
    return tensor.to(device)
