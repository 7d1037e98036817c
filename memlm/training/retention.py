"""Which checkpoints of a run there are, and which of them stay."""

import re
from pathlib import Path

from memlm.files import discard, recover

FOLDER = "checkpoints"
SUPERSEDED = ".superseded"


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / FOLDER / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The steps a checkpoint's name tells; -1 for a folder that is named otherwise."""
    found = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def complete_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, oldest first: a folder gets its name when it is complete."""
    return by_step(run / FOLDER)


def by_step(folder: Path) -> list[Path]:
    """The folders `step_N` in a folder, in the order of their steps."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def keep_latest(run: Path, count: int, every: int = 0) -> None:
    """Delete all but the latest `count` checkpoints and those at multiples of `every` steps."""
    recover(run / FOLDER)
    for path in complete_checkpoints(run)[:-count]:
        if not every or step_of(path) % every:
            discard(path)


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename checkpoints of more than `step` steps, which a resumed run starts to repeat.

    They may be damaged, or of other settings: the run must not go on from them by itself later.

    Returns:
        Their new places, `step_N.superseded`.
    """
    moved = []
    for path in complete_checkpoints(run):
        if step_of(path) > step:
            place = path.with_name(path.name + SUPERSEDED)
            if place.exists():
                discard(place)
            moved.append(path.rename(place))
    return moved
