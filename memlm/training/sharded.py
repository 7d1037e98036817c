"""What every process writes of a checkpoint and reads for itself: sharded weights and moments.

Nothing is gathered for it. torch.distributed.checkpoint cuts tensors anew where a run goes on with
other processes, or with one that shards nothing.

Its index, `.metadata`, is a pickle, the only one that is read without torch's `weights_only`: from
the run's own folder or a checkpoint that the user named, and only after the checksums of that
checkpoint have been compared.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed import tensor as sharded_tensors
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from memlm.errors import SharedError, UserError
from memlm.files import disk_errors
from memlm.models.modeling import PARTS_FOLDER

WEIGHTS, OPTIMIZER = "weights", "optimizer"
Parts = dict[str, TensorStorageMetadata]


def has_parts(checkpoint: Path) -> bool:
    """Whether processes wrote a checkpoint's weights or moments in parts."""
    return (checkpoint / PARTS_FOLDER).is_dir()


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model as it holds them, detached; tied ones under their first name only."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


class _Writer(dcp.FileSystemWriter):
    """Tells of a full disk, which torch.save hides behind an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def write_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write this process's parts of all tensors, and its share of those that all hold; collective.

    Args:
        folder: exists; every process sees it.
        tensors: by kind (WEIGHTS, OPTIMIZER) and name, the same on every process.

    Raises:
        UserError: on every process, when the disk of one is full or refuses.
    """
    flat = {f"{kind}/{name}": t for kind, part in tensors.items() for name, t in part.items()}
    try:
        dcp.save(flat, storage_writer=_Writer(folder))
    except CheckpointException as error:
        try:
            with disk_errors(folder):
                raise _cause(error) from error
        except UserError as told:
            raise SharedError(str(told)) from error


def written_by(folder: Path, process: int) -> Iterable[Path]:
    """The files that `write_parts` made on a process."""
    return folder.glob(f"__{process}_*.distcp")


def stored_parts(checkpoint: Path, kind: str) -> Parts:
    """Shapes and types of the tensors of a kind by name.

    Raises:
        UserError: when they cannot be read.
    """
    reader = dcp.FileSystemReader(checkpoint / PARTS_FOLDER)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return {
        name.removeprefix(f"{kind}/"): tensor
        for name, tensor in stored.items()
        if name.startswith(f"{kind}/")
    }


def read_parts(checkpoint: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded in any way or whole, with those stored under their names; collective.

    Raises:
        UserError: on every process, when a file cannot be read.
    """
    reader = dcp.FileSystemReader(checkpoint / PARTS_FOLDER)
    flat = {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            # One process is no mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(flat, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise SharedError(f"{cause.filename}: cannot be read ({cause.strerror})") from error
        raise cause from error


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong first; all processes are told, in an exception of another kind."""
    return next(cause for cause, _ in error.failures.values())


def read_weights(checkpoint: Path, model: nn.Module) -> None:
    """Give a model, sharded or not, the weights that were stored in parts; collective.

    Raises:
        UserError: for the weights of another model.
    """
    stored, tensors = stored_parts(checkpoint, WEIGHTS), first_names(model)
    for name in sorted(stored.keys() | tensors.keys()):
        there = list(stored[name].size) if name in stored else None
        here = list(tensors[name].shape) if name in tensors else None
        if there != here:
            raise UserError(
                f"{checkpoint}: checkpoint of another architecture: the shape of {name} is {there} "
                f"there and {here} in the config"
            )
    read_parts(checkpoint, WEIGHTS, tensors)


def empty_part(stored: TensorStorageMetadata, like: Tensor, device: torch.device) -> Tensor:
    """Room for a stored tensor, on `device`, or in shards as those of `like` if it has any."""
    dtype = stored.properties.dtype
    if stored.size and isinstance(like, DTensor):
        return sharded_tensors.empty(
            *stored.size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements
        )
    return torch.empty(stored.size, dtype=dtype, device=device)
