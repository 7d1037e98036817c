"""The grid of a suite: every training that it stands for."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memlm.config import RunConfig, build_config
from memlm.data import load_tokenizer
from memlm.errors import UserError, nearest
from memlm.evaluation.suite.config import SuiteConfig
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.setup import check_model
from memlm.yaml_tree import merge

AXES = ("task", "memory", "width", "learning_rate", "seed")


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        task, memory, width, learning_rate, seed: its place in the grid.
        config: its run config, without a run folder.
        parameters: of its model; None for a model that is pretrained.
        flops_per_token: of a forward pass over a row of the last stage; None likewise.
    """

    task: str
    memory: str
    width: int | None
    learning_rate: float
    seed: int
    config: RunConfig
    parameters: int | None
    flops_per_token: int | None

    @property
    def key(self) -> str:
        """Its name, which can be that of a file."""
        name = f"{self.task}_{self.memory}_w{self.width}_lr{self.learning_rate:g}_s{self.seed}"
        return re.sub(r"[^A-Za-z0-9_.+-]", "-", name)

    @property
    def place(self) -> dict[str, Any]:
        """Its place in the grid, by axis."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def work(self) -> float:
        """What its training takes at most, in floating point operations."""
        train = self.config.train
        return float(train.steps * train.tokens_per_step * (self.flops_per_token or 0))


def make_cells(suite: SuiteConfig) -> list[Cell]:
    """All cells in the order of the suite's file, with all that can be checked before training.

    Raises:
        UserError: for a run config that is wrong; it names the task, the memory and the key.
    """
    cells: dict[str, Cell] = {}
    for task, memory in ((task, memory) for task in suite.tasks for memory in suite.memories):
        where = f"{suite.path} (task {task}, memory {memory})"
        sections = merge(merge(suite.base, suite.tasks[task]), suite.memories[memory])
        for cell in _cells_of(suite, sections, task, memory, where):
            if cell.key in cells:
                raise UserError(
                    f"{where}: two cells would be named {cell.key}; give tasks and memories names "
                    "that differ in letters or digits, and learning rates in six digits"
                )
            cells[cell.key] = cell
    return list(cells.values())


def _cells_of(
    suite: SuiteConfig, sections: dict[str, Any], task: str, memory: str, where: str
) -> Iterable[Cell]:
    axes = suite.axes[memory]
    for width in axes.widths or [None]:
        over = {} if width is None else {"model": {"hidden_size": width}}
        config = build_config(merge(sections, over), where)
        if config.evaluate is None:
            raise UserError(f"{where}: needs an evaluate section with the tasks that judge it")
        try:
            wanted = check_model(config, load_tokenizer(config.data.tokenizer), None)
            sizes = _sizes(wanted, config) if isinstance(wanted, MemLMConfig) else (None, None)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        size = wanted.hidden_size if isinstance(wanted, MemLMConfig) else width
        # Muon trains the hidden matrices; the rate of AdamW beside it matters little.
        swept = "muon_learning_rate" if config.train.optimizer == "muon" else "learning_rate"
        if len(axes.learning_rates or []) > 1 and config.train.evaluation_rows == 0:
            raise UserError(
                f"{where}: train.evaluation_rows is 0, but one of the learning rates is chosen by "
                "the loss on held-out rows; use at least 1, or one learning rate"
            )
        for rate in axes.learning_rates or [getattr(config.train, swept)]:
            for seed in suite.seeds:
                train = dataclasses.replace(config.train, **{swept: rate}, seed=seed)
                data = dataclasses.replace(config.data, seed=seed)
                own = dataclasses.replace(config, train=train, data=data)
                yield Cell(task, memory, size, rate, seed, own, *sizes)


def _sizes(config: MemLMConfig, run: RunConfig) -> tuple[int, int]:
    """Parameters of a model and its operations for a token, without making its weights."""
    with torch.device("meta"):
        model = MemLMForCausalLM(config)
    length = run.train.stages()[-1].length
    return sum(one.numel() for one in model.parameters()), model.flops(length) // length


def select(cells: Sequence[Cell], filters: Iterable[str]) -> list[Cell]:
    """The cells that `AXIS=VALUE` filters leave: any value of an axis, all axes that are named.

    Raises:
        UserError: for another axis, or a value that no cell has.
    """
    wanted: dict[str, set[str]] = {}
    for text in filters:
        axis, equals, value = text.partition("=")
        if not equals or axis not in AXES:
            hint = nearest(axis, AXES) or f" (valid: {', '.join(AXES)})"
            raise UserError(f"--only {text}: expected AXIS=VALUE{hint}")
        known = {str(getattr(cell, axis)): getattr(cell, axis) for cell in cells}
        found = {name for name, there in known.items() if name == value or _same(there, value)}
        if not found:
            raise UserError(f"--only {text}: no cell has it (there are: {', '.join(known)})")
        wanted.setdefault(axis, set()).update(found)
    return [
        cell
        for cell in cells
        if all(str(getattr(cell, axis)) in values for axis, values in wanted.items())
    ]


def _same(value: Any, text: str) -> bool:
    """Whether a text is that number, however it is written: 3e-3 is 0.003."""
    try:
        return not isinstance(value, str) and value == float(text)
    except ValueError:
        return False
