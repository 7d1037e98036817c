"""Value tables outside the device's memory, for inference: a token reads a few rows of millions."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memlm.cuda import gathered_dot, weighted_bag
from memlm.errors import UserError
from memlm.memory.value_table import ValueTable

STAGED = 64 << 20  # bytes that are copied at a time


def offload_values(
    model: nn.Module, path: str | Path | None = None, hot_rows: int = 65536
) -> dict[str, "OffloadedTable"]:
    """Move every value table of `model` off its device; outputs stay the same to the last bit.

    Each table becomes an `OffloadedTable`, a shared one once. It is no parameter any more and
    cannot be trained, but stays in `state_dict`, so that a saved model is complete.

    Args:
        model: has at least one `ValueTable`, as it was trained or loaded.
        path: a safetensors file with all tables under their names in `state_dict`. It is written
            if it does not exist; else it must hold the same values, as the model's own checkpoint
            does. Tables are mapped from it and never written to. None keeps them in CPU memory.
        hot_rows: rows of each table that stay on the device, the latest to be read.

    Returns:
        The new tables by name, with counters of what they moved.

    Raises:
        UserError: for a model without tables, with sharded or offloaded ones, or a file with other
            values.
    """
    if hot_rows < 1:
        raise UserError(f"offload_values: hot_rows is {hot_rows}, it must be at least 1")
    tables = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, ValueTable)
    }
    if not tables:
        raise UserError("offload_values: the model has no value table; use a product_key memory")
    for name, table in tables.items():
        if table.sharding is not None or isinstance(table, OffloadedTable):
            state = "offloaded" if isinstance(table, OffloadedTable) else "sharded"
            raise UserError(f"offload_values: {name} is {state} already; load the model anew")
    weights = {f"{name}.weight": table.weight.detach() for name, table in tables.items()}
    if path is None:
        hosts = {name: weight.cpu() for name, weight in weights.items()}
    else:
        hosts = _mapped(Path(path), weights)

    made = {
        table: OffloadedTable(table, hosts[f"{name}.weight"], hot_rows)
        for name, table in tables.items()
    }
    _replace(model, ValueTable, made.__getitem__)
    return {name: made[table] for name, table in tables.items()}


class OffloadedTable(ValueTable):
    """A table whose values are in CPU memory or a mapped file, for inference.

    The device holds the rows that were read last (least recently used ones make place). A call
    that reads more different rows than that gathers all of them for its duration: shorter calls,
    such as generation's prefill in chunks, bound that memory.

    Args:
        table: the table that this one replaces.
        host: its values [slots, value_size] on the CPU; never changed.
        hot_rows: most rows that stay on the device.

    Attributes:
        weight: the values, on the CPU.
        hot: the rows on the device [hot_rows, value_size].
        hits: different rows per call, summed over calls, that were on the device.
        misses: those that were not and were copied.
        bytes_moved: copied to the device.
    """

    def __init__(self, table: ValueTable, host: Tensor, hot_rows: int):
        with torch.device("meta"):
            super().__init__(*host.shape)
        del self.weight
        self.weight = host  # no parameter and no buffer: it does not follow the model to a device
        self.zeroed = table.zeroed
        self.training = table.training
        slots, device = len(host), table.weight.device
        hot_rows = min(hot_rows, slots)

        def start(name: str, size: int, dtype: torch.dtype) -> None:
            tensor = torch.full((size,), -1, dtype=dtype, device=device)
            self.register_buffer(name, tensor, persistent=False)

        hot = torch.zeros(hot_rows, host.shape[1], dtype=host.dtype, device=device)
        self.register_buffer("hot", hot, persistent=False)
        start("place_of_row", slots, torch.int32)  # in `hot`; -1 for a row that is not there
        start("row_at_place", hot_rows, torch.int64)
        start("last_read", hot_rows, torch.int64)  # when, in tokens
        self.tokens = 0
        self.hits = self.misses = self.bytes_moved = 0

    def init_weights(self) -> None:
        """Nothing: the values were trained or loaded."""

    @torch.compiler.disable
    def forward(self, indices: Tensor, weights: Tensor, gate: Tensor | None = None) -> Tensor:
        """As `ValueTable.forward`.

        Raises:
            UserError: where gradients are asked for.
        """
        if self.zeroed:
            return indices.new_zeros(len(indices), self.hot.shape[1], dtype=self.hot.dtype)
        _refuse_gradients(weights, gate)
        rows, indices = self._gather(indices)
        return weighted_bag(indices, weights, rows, gate)

    @torch.compiler.disable
    def dot(self, indices: Tensor, x: Tensor) -> Tensor:
        """`memlm.cuda.gathered_dot` of rows `indices` [tokens, bag] and tokens x."""
        _refuse_gradients(x)
        rows, indices = self._gather(indices)
        return gathered_dot(indices, x, rows)

    @torch.no_grad()
    def _gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows on the device, and the reads [tokens, bag] as numbers of those."""
        if not indices.numel():
            return self.hot, indices
        rows, inverse = indices.unique(return_inverse=True)
        token = torch.arange(self.tokens, self.tokens + len(indices), device=indices.device)
        self.tokens += len(indices)
        read = torch.zeros_like(rows, dtype=torch.int64).scatter_reduce_(
            0, inverse.flatten(), token[:, None].expand_as(inverse).flatten(), "amax"
        )
        places = self.place_of_row[rows].long()
        found, missing = (places >= 0).nonzero()[:, 0], (places < 0).nonzero()[:, 0]
        self.hits += len(found)
        self.misses += len(missing)
        self.last_read[places[found]] = read[found]

        if len(rows) <= len(self.hot):
            if len(missing):
                # No row of this call makes place: all others were read before them.
                places = self._take_places(rows[missing], read[missing])
                self._fetch(rows[missing], self.hot, places)
            return self.hot, self.place_of_row[indices].to(indices.dtype)
        gathered = self.hot.new_empty(len(rows), self.hot.shape[1])
        gathered[found] = self.hot[places[found]]
        self._fetch(rows[missing], gathered, missing)
        latest = read.topk(len(self.hot)).indices
        latest = latest[places[latest] < 0]
        self.hot[self._take_places(rows[latest], read[latest])] = gathered[latest]
        return gathered, inverse.to(indices.dtype)

    def _take_places(self, rows: Tensor, read: Tensor) -> Tensor:
        """Places [len(rows)] for rows that are not on the device, from those read longest ago."""
        places = self.last_read.topk(len(rows), largest=False).indices
        before = self.row_at_place[places]
        self.place_of_row[before[before >= 0]] = -1
        self.place_of_row[rows] = places.int()
        self.row_at_place[places] = rows.long()
        self.last_read[places] = read
        return places

    def _fetch(self, rows: Tensor, target: Tensor, places: Tensor) -> None:
        """Copy rows of the table to `places` of a tensor on the device, some at a time."""
        step = max(1, STAGED // (self.weight.shape[1] * self.weight.element_size()))
        pinned = target.is_cuda
        for part, to in zip(rows.cpu().split(step), places.split(step), strict=True):
            shape = (len(part), self.weight.shape[1])
            # Pinned memory comes from torch's cache, which waits for copies out of it.
            staged = torch.empty(shape, dtype=self.weight.dtype, pin_memory=pinned)
            torch.index_select(self.weight, 0, part, out=staged)
            target.index_copy_(0, to, staged.to(target.device, target.dtype, non_blocking=pinned))
            self.bytes_moved += staged.nbytes

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:
            raise UserError(
                f"{prefix}weight: offloaded values cannot be loaded; load the weights first and "
                "call offload_values then"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UserError(
            "offloaded values are for inference alone: call the model under torch.no_grad(), or "
            "load it anew to train it"
        )


def _replace(model: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put make(module) in the place of every module of a kind, once for one that is shared."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, kind):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])


def _mapped(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, mapped; the file is written if it does not exist."""
    try:
        written = not path.exists()
        if written:
            _write(path, weights)
        found = {}
        for name, weight in weights.items():
            # Opened for each anew: transformers takes tensors of one storage for tied ones.
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
            if not written and not _equal(found[name], weight):
                raise UserError(
                    f"offload_values: {path} has no {name} with the model's values; give a path "
                    "that does not exist yet"
                )
    except (OSError, SafetensorError) as error:
        raise UserError(f"offload_values: {path} cannot be used: {error}") from error
    return found


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """Under another name, which is changed when all is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _equal(stored: Tensor | None, weight: Tensor) -> bool:
    """Whether two tables have the same bits; some rows at a time come from the device."""
    if stored is None or (stored.shape, stored.dtype) != (weight.shape, weight.dtype):
        return False
    step = max(1, STAGED // (weight.shape[1] * weight.element_size()))
    return all(
        torch.equal(a.view(torch.uint8), b.cpu().contiguous().view(torch.uint8))
        for a, b in zip(stored.split(step), weight.split(step), strict=True)
    )
