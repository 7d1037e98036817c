"""Weights, gradients and moments of a model, and what each process has of them."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.memory.scaling import SharedTable
from memlm.training.optimizer import parameter_groups, table_reads, table_updates

Parallel = Literal["ddp", "fsdp2", "zero2"]
FLOAT, BFLOAT, INDEX = 4, 2, 8  # bytes; of a row's number where reads are summed
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter that data parallelism knows.

    Attributes:
        name: in the model.
        shape: of the whole.
        block: the number of its block; None = outside of all blocks.
        moments: numbers of optimizer state for each of its own.
        trains: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    moments: int
    trains: bool

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    def shard(self, processes: int) -> int:
        """Numbers of the largest part, were the first dimension divided as torch.chunk does."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // processes) * torch.Size(self.shape[1:]).numel()


@dataclasses.dataclass(frozen=True)
class Table:
    """A value table that learns by rows, beside what data parallelism knows.

    Attributes:
        name: in the model.
        shared: how the processes hold it.
        method: "lazy_adam" or "rowwise_adagrad".
        layers: layers that read it.
    """

    name: str
    shared: SharedTable
    method: str
    layers: int

    @property
    def value_bytes(self) -> float:
        """Values of a process."""
        numbers = self.shared.slots * self.shared.width / self.shared.processes
        return numbers * self.shared.value_bytes

    @property
    def moment_bytes(self) -> float:
        """Optimizer state of a process."""
        if self.method == "rowwise_adagrad":
            rows = self.shared.slots / (self.shared.processes if self.shared.by == "rows" else 1)
            return rows * FLOAT
        return self.shared.memory_bytes - self.value_bytes

    def waiting_bytes(self, batches: Sequence[int]) -> float:
        """Reads of a step that wait on a process; they are summed once a whole table is smaller.

        Args:
            batches: tokens of the process's micro-batches.
        """
        shared = self.shared
        reads = self.layers * sum(shared.pending_bytes(tokens) for tokens in batches)
        numbers = shared.slots * shared.width / shared.processes
        if reads <= FLOAT * numbers or self.layers * len(batches) == 1:
            return reads
        read = shared.distinct_rows(sum(batches) * self.layers * shared.processes)
        rows, channels = read, shared.width / shared.processes
        if shared.by == "rows":
            rows, channels = read / shared.processes, shared.width
        return rows * (INDEX + FLOAT + FLOAT * channels)


@dataclasses.dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    dense: list[Weight]
    tables: list[Table]

    @functools.cached_property
    def numbers(self) -> int:
        """Of what data parallelism knows."""
        return sum(weight.numbers for weight in self.dense)

    def unit_numbers(self, processes: int = 1, trained: bool = False) -> dict[int | None, int]:
        """Numbers of each block (None: of all that is outside), padded to equal shards.

        Args:
            processes: that have the shards.
            trained: leave out what has no gradient.
        """
        units: dict[int | None, int] = {None: 0}
        for weight in self.dense:
            if trained and not weight.trains:
                continue
            padded = weight.shard(processes) * processes
            units[weight.block] = units.get(weight.block, 0) + padded
        return units


def weights_of(model: nn.Module, options: TrainConfig) -> Weights:
    """The weights of a model, which may be on the meta device.

    Raises:
        UserError: for an optimizer that shared tables cannot have, or tables that are not there.
    """
    groups = parameter_groups(model)
    muon = set(groups["matrices"]) if options.optimizer == "muon" else set()
    trains = {name for names in groups.values() for name in names}
    tables = _tables(model, options)
    apart = {table.name for table in tables}
    dense = []
    for name, parameter in model.named_parameters():
        if name in apart:
            continue
        found = _BLOCK.search(name)
        moments = 0
        if name in trains:
            moments = 1 if name in muon else 2
        block = int(found[1]) if found else None
        dense.append(Weight(name, tuple(parameter.shape), block, moments, name in trains))
    return Weights(dense, tables)


def _tables(model: nn.Module, options: TrainConfig) -> list[Table]:
    together, method = options.memory_parallel, options.value_optimizer
    if together > 1:
        if method == "adam":
            raise UserError(
                "train.value_optimizer: adam updates whole tables, but train.memory_parallel "
                "shares them; use lazy_adam or rowwise_adagrad"
            )
        if method == "rowwise_adagrad" and options.memory_shard == "columns":
            raise UserError(
                "train.value_optimizer: rowwise_adagrad needs whole rows; use "
                "train.memory_shard: rows, or lazy_adam"
            )
        method = "lazy_adam" if method == "auto" else method
    updates = table_updates(model, dataclasses.replace(options, value_optimizer=method))
    if together > 1 and not updates:
        raise UserError("train.memory_parallel: the model has no value table")
    reads = table_reads(model)
    found = []
    for update in updates:
        if update.method == "adam":
            continue
        slots, width = update.table.weight.shape
        by_layer = reads[update.table]
        shared = SharedTable(slots, width, together, options.memory_shard, by_layer[0])
        found.append(Table(f"{update.name}.weight", shared, update.method, len(by_layer)))
    return found
