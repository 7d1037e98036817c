"""Memory states carried from row to row: one lane per row of a step."""

from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlm.errors import UserError
from memlm.layers.state import MemoryState

MEMORY_FILE = "memory_states.safetensors"
States = dict[str, MemoryState]


class Lanes:
    """The micro-batches of one process and the states their rows carry.

    Lane i of a step is its i-th global row, whatever the number of processes.

    Args:
        first: first lane of this process.
        count: lanes of this process.
        size: most lanes of one micro-batch; None = all.
    """

    def __init__(self, first: int, count: int, size: int | None = None):
        self.first = first
        self.slices = [
            slice(start, min(start + (size or count), count))
            for start in range(0, count, size or count)
        ]
        self.states: list[States | None] = [None] * len(self.slices)

    def gather(self) -> dict[str, Tensor]:
        """The states of all lanes of all processes, by `first lane/state name/field`.

        Every process has to call this. Empty when nothing is carried.
        """
        own = {
            f"{self.first + rows.start}/{name}/{field}": tensor.cpu()
            for rows, states in zip(self.slices, self.states, strict=True)
            for name, state in (states or {}).items()
            for field, tensor in state.state_dict().items()
        }
        return {key: tensor for part in gather_object([own]) for key, tensor in part.items()}

    def load(self, folder: Path, templates: States, device: torch.device) -> None:
        """Take this process's states from a checkpoint, however it was cut into lanes.

        Args:
            folder: the checkpoint; without saved states nothing is carried.
            templates: any states of the model; they tell the class of each.
            device: where the states go.

        Raises:
            UserError: when states saved in pieces cannot be joined.
        """
        if not (folder / MEMORY_FILE).exists():
            return
        pieces = _read(folder / MEMORY_FILE, templates)
        for index, rows in enumerate(self.slices):
            states = _cut(pieces, self.first + rows.start, rows.stop - rows.start)
            self.states[index] = {name: state.to(device) for name, state in states.items()}


def save_states(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write gathered states into a checkpoint; nothing when nothing is carried."""
    if tensors:
        save_file(tensors, folder / MEMORY_FILE)


def _read(path: Path, templates: States) -> list[tuple[int, States]]:
    """(first lane, states) of each saved piece, in order."""
    saved: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_file(path).items():
        lane, name, field = key.split("/", 2)
        saved.setdefault(int(lane), {}).setdefault(name, {})[field] = tensor
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
