"""Memory states carried from row to row: one lane per row of a step."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlm.errors import UserError
from memlm.layers.state import MemoryState
from memlm.training.sharded import PARTS_FOLDER

MEMORY_FILE = "memory_states.safetensors"
States = dict[str, MemoryState]


class Lanes:
    """The micro-batches of one process and the states their rows carry.

    Lane i of a step is its i-th global row, whatever the number of processes.

    Args:
        first: first lane of this process.
        count: lanes of this process.
        size: most lanes of one micro-batch; None = all.
        saves: whether this process writes its lanes; of several with the same ones, one does.
    """

    def __init__(self, first: int, count: int, size: int | None = None, saves: bool = True):
        self.first, self.saves = first, saves
        self.slices = [
            slice(start, min(start + (size or count), count))
            for start in range(0, count, size or count)
        ]
        self.states: list[States | None] = [None] * len(self.slices)

    def own(self) -> dict[str, Tensor]:
        """The states of this process's lanes on the CPU, by `first lane/state name/field`.

        Empty when nothing is carried, or another process writes them.
        """
        if not self.saves:
            return {}
        return {
            f"{self.first + rows.start}/{name}/{field}": tensor.cpu()
            for rows, states in zip(self.slices, self.states, strict=True)
            for name, state in (states or {}).items()
            for field, tensor in state.state_dict().items()
        }

    def gather(self) -> dict[str, Tensor]:
        """The states of the lanes of all processes, as `own` gives them; collective."""
        parts = gather_object([self.own()])
        return {key: tensor for part in parts for key, tensor in part.items()}

    def load(self, folder: Path, templates: States, device: torch.device) -> None:
        """Take this process's states from a checkpoint, however it was cut into lanes.

        Args:
            folder: the checkpoint; without saved states nothing is carried.
            templates: any states of the model; they tell the class of each.
            device: where the states go.

        Raises:
            UserError: when states saved in pieces cannot be joined, or are those of fewer rows.
        """
        files = [*folder.glob(MEMORY_FILE), *folder.glob(f"{PARTS_FOLDER}/*{MEMORY_FILE}")]
        if not files:
            return
        wanted = range(self.first, self.first + self.slices[-1].stop)
        pieces = _read(files, templates, wanted)
        for index, rows in enumerate(self.slices):
            count = rows.stop - rows.start
            states = _cut(pieces, self.first + rows.start, count)
            if not states or any(state.batch_size != count for state in states.values()):
                raise UserError(
                    f"{folder}: it carries the memory states of fewer rows than a step has; resume "
                    "with the train.tokens_per_step it was trained with"
                )
            self.states[index] = {name: state.to(device) for name, state in states.items()}


def save_states(tensors: dict[str, Tensor], folder: Path, prefix: str = "") -> None:
    """Write states into a checkpoint, or those of a process into its parts, under `prefix`.

    Nothing when nothing is carried.
    """
    if tensors:
        save_file(tensors, folder / f"{prefix}{MEMORY_FILE}")


def _read(paths: Iterable[Path], templates: States, wanted: range) -> list[tuple[int, States]]:
    """(first lane, states) of the saved pieces that have wanted lanes, in order."""
    saved: dict[int, dict[str, dict[str, Tensor]]] = {}
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        keys = [(key, file) for file in files for key in file.keys()]  # noqa: SIM118
        found = [(int(key.split("/")[0]), key, file) for key, file in keys]
        firsts = sorted({lane for lane, _, _ in found})
        ends = dict(zip(firsts, [*firsts[1:], wanted.stop], strict=True))
        for lane, key, file in found:
            if lane < wanted.stop and ends[lane] > wanted.start:
                _, name, field = key.split("/", 2)
                saved.setdefault(lane, {}).setdefault(name, {})[field] = file.get_tensor(key)
    return [
        (lane, {name: type(templates[name]).from_state_dict(t) for name, t in states.items()})
        for lane, states in sorted(saved.items())
    ]


def _cut(pieces: list[tuple[int, States]], first: int, count: int) -> States:
    """The states of the lanes first .. first + count."""
    parts: dict[str, list[MemoryState]] = {}
    for lane, states in pieces:
        for name, state in states.items():
            low, high = max(first - lane, 0), min(first + count - lane, state.batch_size)
            if low < high:
                parts.setdefault(name, []).append(state.select(torch.arange(low, high)))
    joined = {}
    for name, states in parts.items():
        tensors = [state.tensors() for state in states]
        try:
            merged = {key: torch.cat([part[key] for part in tensors]) for key in tensors[0]}
        except RuntimeError as error:
            raise UserError(
                "the memory states of the checkpoint cannot be cut anew; resume with its number "
                "of processes and train.micro_batch_rows"
            ) from error
        joined[name] = type(states[0]).from_state_dict(merged)
    return joined
