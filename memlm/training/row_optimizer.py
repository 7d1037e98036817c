"""An optimizer of value tables that touches only the rows that were read."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from memlm.cuda import (
    LazyAdam,
    PendingReads,
    Reads,
    RowwiseAdagrad,
    row_gradients,
    update_rows,
)
from memlm.errors import UserError
from memlm.memory import ValueTable

Method = Literal["lazy_adam", "rowwise_adagrad"]
_RULES: dict[str, type[LazyAdam] | type[RowwiseAdagrad]] = {
    "lazy_adam": LazyAdam,
    "rowwise_adagrad": RowwiseAdagrad,
}


class RowOptimizer(torch.optim.Optimizer):
    """Lazy Adam or row-wise Adagrad on the reads that the backward passes left in the tables.

    The tables' `weight.grad` stays None from now on: the reads of all micro-batches and layers
    wait in `table.pending`, and `step` sums those of a row and updates the row at once. Rows that
    nobody read keep their values and moments. Two runs are bit-equal.

    Args:
        tables: the tables; each may be read by several layers.
        lr: learning rate.
        method: "lazy_adam" is AdamW when every row is read; "rowwise_adagrad" keeps one number
            per row instead of two tables.
        betas, eps: of Adam; row-wise Adagrad has no betas.
        weight_decay: decoupled, of the rows that were read.
        exchange: brings together the reads of processes that hold the same rows, in the same
            order on all of them; None for one process.
        processes: what summed gradients are divided by, as data parallelism averages them.

    Raises:
        UserError: for an unknown method, or row-wise Adagrad on tables cut into columns.
    """

    def __init__(
        self,
        tables: Iterable[ValueTable],
        lr: float = 1e-3,
        method: Method = "lazy_adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exchange: Callable[[list[Reads]], list[Reads]] | None = None,
        processes: int = 1,
    ):
        if method not in _RULES:
            raise UserError(f"RowOptimizer: method is {method!r}, it must be one of {[*_RULES]}")
        self.tables = list(tables)
        if method == "rowwise_adagrad" and any(map(_has_columns, self.tables)):
            raise UserError(
                "rowwise_adagrad needs whole rows, but the table is cut into columns; shard it by "
                "rows, or use lazy_adam"
            )
        self.method, self.exchange, self.processes = method, exchange, processes
        self._factor = 1.0
        for table in self.tables:
            table.pending = PendingReads(len(_local(table.weight)))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([table.weight for table in self.tables], defaults)

    def squared_norm(self) -> float:
        """Square of the norm of this step's gradient, over all shards of the tables.

        The reads are summed to a gradient of the rows for it, which `step` then uses.
        """
        total = 0.0
        for table in self.tables:
            reads = self._gathered(table)
            squares = torch.zeros((), dtype=torch.float64, device=table.weight.device)
            if reads:
                rows, gradient = row_gradients(reads, table.pending.num_rows)
                table.pending.reads = [_Summed.of_rows(rows, gradient)]
                squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            if isinstance(table.weight, DTensor):
                for dimension, placement in enumerate(table.weight.placements):
                    if placement.is_shard():
                        group = table.weight.device_mesh.get_group(dimension)
                        dist.all_reduce(squares, group=group)
            total += float(squares)
        return total / self.processes**2

    def scale_gradients(self, factor: float) -> None:
        """Multiply this step's gradients, to bound a norm that other parameters share."""
        self._factor *= factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows that were read since the last step; the reads are used up."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = {
            id(parameter): group for group in self.param_groups for parameter in group["params"]
        }
        for table in self.tables:
            reads = self._gathered(table)
            table.pending.take()
            # Parts of one table count steps together, also those of which nobody read a row.
            if reads or isinstance(table.weight, DTensor):
                self._update(table.weight, reads, options[id(table.weight)])
        self._factor = 1.0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the reads since the last step."""
        super().zero_grad(set_to_none)
        self._factor = 1.0
        for table in self.tables:
            table.pending.take()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer; moments have at least float32, also those of tables in bfloat16.

        Raises:
            UserError: for the state of another method.
        """
        wanted = {"step", *_RULES[self.method].init_state(torch.empty(0, 1))}
        for entries in state_dict["state"].values():
            if entries and entries.keys() != wanted:
                raise UserError(
                    f"RowOptimizer: the state has {', '.join(sorted(entries))}, but {self.method} "
                    f"has {', '.join(sorted(wanted))}"
                )
        super().load_state_dict(state_dict)
        for key, entries in state_dict["state"].items():
            parameter = self._parameters()[key]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            for name, value in entries.items():
                loaded, to = self.state[parameter][name], value.dtype if name == "step" else dtype
                self.state[parameter][name] = value.clone().to(loaded.device, to)

    def _parameters(self) -> list[Tensor]:
        """In the order that `state_dict` numbers them."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _gathered(self, table: ValueTable) -> list[Reads]:
        """The reads of all processes that hold these rows; exchanged once a step."""
        reads = table.pending.reads
        if reads and isinstance(reads[0], _Summed):
            return reads
        if self.exchange is None:
            return reads
        if not reads:  # the other processes wait for this one
            values = _local(table.weight)
            nothing = torch.zeros(0, 1, dtype=torch.int32, device=values.device)
            reads = [Reads(nothing, nothing.float(), values[:0])]
        return [part for part in self.exchange(reads) if part.indices.numel()]

    def _update(self, weight: Tensor, reads: list[Reads], group: dict[str, Any]) -> None:
        state, values = self.state[weight], _local(weight)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, tensor in _RULES[self.method].init_state(values).items():
                state[name] = _like(weight, tensor)
        state["step"] += 1
        rule = {
            "learning_rate": group["lr"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "scale": self._factor / self.processes,
        }
        if self.method == "lazy_adam":
            rule |= {"betas": tuple(group["betas"]), "step": int(state["step"])}
        kept = {name: _local(tensor) for name, tensor in state.items() if name != "step"}
        update_rows(reads, values, kept, _RULES[self.method](**rule))


class _Summed(Reads):
    """Reads that are the gradients of their rows, of all processes already."""


def _local(tensor: Tensor) -> Tensor:
    """The rows and columns that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _like(weight: Tensor, local: Tensor) -> Tensor:
    """An entry of the state, sharded as its table is."""
    if not isinstance(weight, DTensor):
        return local
    shape = weight.shape[: local.ndim]
    stride = tuple(
        weight.stride()[i] // (weight.shape[1] if local.ndim == 1 else 1) for i in range(local.ndim)
    )
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    )


def _has_columns(table: ValueTable) -> bool:
    weight = table.weight
    return isinstance(weight, DTensor) and any(p.is_shard(1) for p in weight.placements)
