"""What the memories of a model do in training: how far their gates are open, how large their states
are, how much they are surprised, how full their stores are."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.layers.gated_norm import GatedRMSNorm
from memlm.memory.base import MemoryState
from memlm.memory.memorizing_attention import StoreAttention
from memlm.memory.output_memory import OUTPUT, OutputMemory
from memlm.memory.product_key import ProductKey
from memlm.memory.titans_attention import MemoryGate
from memlm.memory.titans_memory import TitansMemory
from memlm.models.block import Branch
from memlm.retrieval.vector_store import VectorStore
from memlm.training.loss import total

# The fields of a state that hold what a memory remembers; others are tails and counters.
_REMEMBERED = ("recurrent", "weights")


class MemoryMetrics:
    """Means over the tokens of the steps that are watched; nothing is measured in other steps.

    - SITE.gate_mean: size of the gates that the memory computes for its output, in the mean over
      tokens and channels: of silu in the gated norm of gated_delta, retention and titans, in the
      gate of titans mag and mac and of product_key; of its sigmoid, where product_key is `gated`;
      of the gates of memorizing_attention's heads.
    - SITE.gain_mean: size of the learned gain on the branch (`gate` in the config), in the mean
      over channels.
    - SITE.state_norm: root mean square of what the memory remembers at the end of the rows: its
      matrix, its channels, or the weights of its network.
    - SITE.surprise: loss of a token at the weights at which its gradient is taken, for memories
      that learn while they read.
    - SITE.fill: share of the slots of a store that hold an entry at the end of the rows.

    Every token counts once, and what the backward pass recomputes does not. What is measured
    changes nothing in training. The surprise needs a forward pass of the memory of its own, without
    gradients, since fused kernels do not tell it and recomputed blocks have to be the same in both
    passes; it is therefore that of the first micro-batch of each process.

    Args:
        model: the model, without wrappers.
        accelerator: its processes; `report` is collective.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.accelerator = accelerator
        self._watches: list[Callable[[], Any]] = []  # each begins to watch and returns how to end
        self._names: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, Branch) and module.is_memory:
                self._add_branch(name.removeprefix("model."), module)
            elif isinstance(module, OutputMemory):
                state = module.init_state(1, torch.device("meta"))
                self._add_state(OUTPUT, state)
                self._watches.append(partial(_hook, module, self._output))
        self._sums: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}

    def _add_branch(self, site: str, branch: Branch) -> None:
        states = branch.init_states("", 1, torch.device("meta"))
        self._add_state(site, states.get(""))
        if branch.gate is not None:
            self._names.append(f"{site}.gain_mean")
        self._watches.append(partial(_hook, branch, partial(self._branch, site)))
        for module in branch.module.modules():
            gate = _gate(module)
            if gate is not None:
                self._names.append(f"{site}.gate_mean")
                self._watches.append(partial(_hook, gate[0], partial(self._gate, site, gate[1])))
            if isinstance(module, TitansMemory):
                self._names.append(f"{site}.surprise")
                self._watches.append(partial(self._watch_surprise, f"{site}.surprise", module))

    def _add_state(self, site: str, state: MemoryState | None) -> None:
        self._names += [f"{site}.{name}" for name in _measure_state(state)]

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Measure what the memories do in the forward passes of a micro-batch in here."""
        with contextlib.ExitStack() as stack:
            for begin in self._watches:
                end = begin()
                if end is not None:
                    stack.callback(end)
            yield
        # Rows that were run in segments have one end.
        for name, sums in self._latest.items():
            self._add(name, sums)
        self._latest = {}

    def clear(self) -> None:
        """Forget what was measured since the last report."""
        self._sums = {}

    def report(self) -> dict[str, float | None]:
        """The metrics since the last report; None for one that is not finite."""
        if not self._names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float32, device=self.accelerator.device)
        sums = torch.stack([self._sums.get(name, nothing) for name in self._names])
        self.clear()
        result = {}
        for name, (found, count) in zip(
            self._names, total(sums, self.accelerator).tolist(), strict=True
        ):
            if count:
                mean = found / count
                if name.endswith(".state_norm"):
                    mean = math.sqrt(mean)
                result[name] = mean if math.isfinite(mean) else None
        return result

    def _add(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _add_sizes(self, name: str, values: Tensor) -> None:
        self._add(name, _pair(values.detach().float().abs().sum(), values.numel()))

    def _branch(self, site: str, branch: Branch, args: tuple, output: tuple) -> None:
        if branch.gate is not None:
            self._add_sizes(f"{site}.gain_mean", branch.gate)
        sequence = args[3].sequence
        if sequence is None or sequence.is_last:  # others do not have the end of the rows
            self._end_of_rows(site, output[1].get(args[1]))

    @torch.no_grad()
    def _gate(self, site: str, values: Callable[..., Tensor | None], *call: Any) -> None:
        found = values(*call)
        if found is not None:
            self._add_sizes(f"{site}.gate_mean", found)

    def _output(self, memory: OutputMemory, args: tuple, output: tuple) -> None:
        self._end_of_rows(OUTPUT, output[1])

    def _end_of_rows(self, site: str, state: MemoryState | None) -> None:
        for name, sums in _measure_state(state).items():
            self._latest[f"{site}.{name}"] = sums

    def _watch_surprise(self, name: str, memory: TitansMemory) -> Callable[[], None] | None:
        if name in self._sums:
            return None
        record = _SurpriseSum(lambda part: self._add(name, part))

        def again(module: TitansMemory, args: tuple, output: Any) -> None:
            x, state, *others = args
            updates, module.updates, module.surprise = module.updates, None, record
            try:
                with torch.no_grad():
                    # Without gradients a memory may change its state in place.
                    module.forward(x, state.clone(), *others)
            finally:
                module.updates, module.surprise = updates, None

        return _hook(memory, again)


@dataclasses.dataclass
class _SurpriseSum:
    """Takes what a `memlm.memory.records.Surprise` takes, and keeps nothing but its sum."""

    add: Callable[[Tensor], None]

    def take(self, part: Tensor) -> None:
        self.add(_pair(part.detach().float().sum(), part.numel()))

    def finish(self, arrange: Callable[[Tensor], Tensor]) -> None:
        """Tokens need no order."""


def _measure_state(state: MemoryState | None) -> dict[str, Tensor]:
    """What can be said of a state: by metric, a sum and its count, float32 [2]."""
    if isinstance(state, VectorStore):
        slots = state.batch_size * state.capacity
        return {"fill": _pair(state.count.sum().float(), slots)} if slots else {}
    for field in _REMEMBERED:
        tensors = getattr(state, field, ())
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        if tensors:
            squares = sum(tensor.detach().float().square().sum() for tensor in tensors)
            return {"state_norm": _pair(squares, sum(tensor.numel() for tensor in tensors))}
    return {}


def _pair(found: Tensor, count: int) -> Tensor:
    return torch.stack((found, torch.full_like(found, count)))


def _hook(module: nn.Module, function: Callable[..., None]) -> Callable[[], None]:
    """Call `function(module, args, output)` after each call of a module, until what is returned is
    called."""
    return module.register_forward_hook(function).remove


def _gate(module: nn.Module) -> tuple[nn.Module, Callable[..., Tensor | None]] | None:
    """Where the gate of a part of a memory can be seen: what to hook, and what makes the values of
    the gate of its (module, args, output); None for a part without a gate."""
    if isinstance(module, GatedRMSNorm):
        return (
            module,
            lambda module, args, _output: (
                module.opening(args[1]) if len(args) > 1 and args[1] is not None else None
            ),
        )
    if isinstance(module, MemoryGate):
        return module.m_norm, lambda _module, _args, output: F.silu(output)
    if isinstance(module, StoreAttention):
        activation = torch.sigmoid if module.config.head_gate == "sigmoid" else torch.tanh
        return module, lambda module, _args, _output: activation(module.head_bias)
    if isinstance(module, ProductKey) and module.scalar_gate is not None:
        return module.scalar_gate, lambda _module, _args, output: output.sigmoid()
    if isinstance(module, ProductKey) and module.gate_proj is not None:
        return module.gate_proj, lambda _module, _args, output: F.silu(output)
    return None
