"""The bytes that a forward and a backward pass need, from the real model without its numbers."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from memlm.cuda import PendingReads
from memlm.cuda.dispatch import chosen_by
from memlm.layers.state import MemoryState
from memlm.memory import ValueTable
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.models.activations import set_activations, set_blockwise
from memlm.training.loss import RowLoss
from memlm.training.plan.sequence import counted
from memlm.training.plan.shapes import (
    ShapesOfFloats,
    as_on_a_gpu,
    eager_where_possible,
    without_launches,
)

Device = Literal["gpu", "cpu"]
_TWICE = 2  # blocks of a kind that are run: the first may make what the others share
_NEVER_SUMMED = 1 << 40  # rows of a table that is larger than all reads
_ON_DEVICE = 2  # blocks whose tensors are on the device while the others are offloaded


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one forward pass on one process.

    Attributes:
        count: rows.
        length: tokens of each.
        document: tokens of each document in them, one behind the other; no document ends in a row
            that is not longer.
        continued: whether they go on from carried states.
        together: processes that hold each of them together; this one has the last columns.
    """

    count: int
    length: int
    document: int
    continued: bool = False
    together: int = 1

    @property
    def columns(self) -> int:
        """Tokens of each row that the process has."""
        return self.length // self.together

    def batch(self) -> dict[str, Tensor]:
        """As the trainer gives rows to the model, every token a target."""
        places = torch.arange(self.length)
        document = self.document
        if document >= self.length:
            document = 2 * self.length
        if self.continued:
            places = places + document // 2
        rows = {
            "input_ids": torch.zeros_like(places),
            "segment_ids": places // document + 1,
            "position_ids": places % document,
            "labels": torch.zeros_like(places[: self.columns]),
            "loss_groups": torch.zeros_like(places[: self.columns]),
        }
        return {name: row.repeat(self.count, 1) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of the passes of one micro-batch on one process, weights and their gradients aside.

    Attributes:
        kept: what waits for the backward pass on the device when the forward pass has ended.
        working: what is needed beyond that at the worst moment of both passes.
        host: what waits in the CPU's memory.
        states: the memory states that the rows hand on.
        sent: bytes by operation that the processes which hold the rows together send, as
            `Traffic.payload`.
    """

    kept: int
    working: int
    host: int
    states: int
    sent: dict[str, int] = dataclasses.field(default_factory=dict)


def footprint(
    config: MemLMConfig,
    rows: Rows,
    activations: str = "keep",
    *,
    blockwise_tokens: int | None = None,
    mixed_precision: str = "no",
    low_precision_weights: bool = False,
    by_rows: bool = True,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    window: int | None = None,
    device: Device = "gpu",
    batch: Mapping[str, Tensor] | None = None,
) -> Footprint:
    """Run both passes of a model without its numbers.

    At most two blocks of a kind are run, and the others count as the second of them.

    Args:
        config: of the model.
        rows: of the passes.
        activations: `train.activations`.
        blockwise_tokens: `train.blockwise_tokens`.
        mixed_precision: "no" or "bf16".
        low_precision_weights: whether the weights of the passes are bfloat16 already, as FSDP2
            gathers them with mixed precision.
        by_rows: whether value tables are updated by rows: their reads wait then.
        prepare: changes the model before it runs.
        window: cap on attention windows.
        device: whose implementations are counted: the Triton kernels of a GPU, or plain torch.
        batch: the rows themselves, in place of `rows.batch()`.
    """
    patterns: dict[str, tuple[dict, int]] = {}
    for pattern in config.layers:
        kind = {key: value for key, value in pattern.items() if key != "repeat"}
        before = patterns.get(repr(kind), (kind, 0))[1]
        patterns[repr(kind)] = (kind, before + pattern.get("repeat", 1))
    layers = [kind | {"repeat": min(n, _TWICE)} for kind, n in patterns.values()]
    factors: list[int] = []
    for _, n in patterns.values():
        factors += [1] * (min(n, _TWICE) - 1) + [max(1, n - _TWICE + 1)]

    mode = ShapesOfFloats()
    with mode.fake:
        few = copy.deepcopy(config)
        few.layers = layers
        row_loss = RowLoss(MemLMForCausalLM(few)).train()
        if low_precision_weights:
            _lower(row_loss, by_rows)
    model = row_loss.model
    prepare(model)
    model.set_attention_window(window)
    offloads = activations in ("offload", "recompute_offload")
    set_activations(
        model, {"offload": "keep", "recompute_offload": "recompute"}.get(activations, activations)
    )
    set_blockwise(model, blockwise_tokens)
    mode.leave_out([*row_loss.parameters(), *row_loss.buffers()])
    for module in model.modules():
        if isinstance(module, ValueTable) and by_rows:
            module.pending = PendingReads(_NEVER_SUMMED)
    for parameter in row_loss.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)

    chooser = as_on_a_gpu if device == "gpu" else eager_where_possible
    low = mixed_precision == "bf16"
    group = counted(model, rows.together)
    with group as sent, chosen_by(chooser), without_launches(), mode:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            states = None
            if rows.continued:
                first = dataclasses.replace(rows, continued=False).batch()
                states = row_loss(first, carry=True)[2]
            batch = rows.batch() if batch is None else dict(batch)
            start, mode.peak = mode.live, mode.live
            sent.nbytes.clear()  # of the call that made the states
            with _marks(model, mode) as marks:
                loss, _, handed_on = row_loss(batch, states, carry=rows.continued)
            carried = 0
            if handed_on is not None:
                carried = _times_factors(_by_block(handed_on, len(factors)), factors)
            del handed_on
            kept = mode.live - start
        loss.backward()
        peak = mode.peak - start
    blocks = [after - before for before, after in itertools.pairwise(marks)]
    further = _times_factors(blocks, factors) - sum(blocks)
    working = peak - kept
    kept += further
    travels: dict[str, int] = {}
    for (operation, number), size in sent.nbytes.items():
        travels[operation] = travels.get(operation, 0) + factors[number] * size
    if not offloads:
        return Footprint(kept, working, 0, carried, travels)
    host = max(0, _times_factors(blocks, factors) - _ON_DEVICE * max(blocks))
    return Footprint(kept - host, working, _times_factors(blocks, factors), carried, travels)


def _lower(root: nn.Module, tables_apart: bool) -> None:
    """Make the weights bfloat16; not those of tables that FSDP2 leaves alone, nor buffers."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        if isinstance(module, ValueTable) and tables_apart:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                low = weight.detach().to(torch.bfloat16)
                made[id(weight)] = nn.Parameter(low, weight.requires_grad)
            setattr(module, name, made[id(weight)])


def _drop(parameter: Tensor) -> None:
    # Gradients are counted apart: how many are there depends on how processes share them.
    parameter.grad = None


@contextlib.contextmanager
def _marks(model: MemLMForCausalLM, mode: ShapesOfFloats) -> Iterator[list[int]]:
    """The live bytes before each block and behind the last one, of the forward pass."""
    marks: list[int] = []
    modules = [*model.model.layers, model.model.norm]
    handles = [
        module.register_forward_pre_hook(lambda *_: marks.append(mode.live)) for module in modules
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _by_block(states: Mapping[str, MemoryState], blocks: int) -> list[int]:
    """Bytes of the states of each block; those of the model itself are a few numbers per row."""
    found = [0] * blocks
    for name, state in states.items():
        number = name.partition(".")[0]
        if number.isdigit():
            found[int(number)] += state.nbytes
    return found


def _times_factors(numbers: list[int], factors: list[int]) -> int:
    return sum(number * factor for number, factor in zip(numbers, factors, strict=True))
