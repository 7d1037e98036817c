"""From the tensors of one side to those of the other, one by one, and what stands in the way."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from memlm.errors import UserError
from memlm.models.interop.architecture import Rule, Tensors
from memlm.models.interop.checkpoint import Checkpoint

_SHOWN = 3  # names in a message


@dataclasses.dataclass(frozen=True)
class Step:
    """Some tensors of the source, read together, and what becomes of them."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    apply: Callable[..., Tensors]


@dataclasses.dataclass
class Report:
    """What a conversion finds out before it reads a number.

    Attributes:
        missing: tensors that the source should have.
        unused: tensors of the source that have no place on the other side.
        dropped: tensors of the source that nothing reads.
        wrong: tensors of another shape: found and expected.
    """

    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    wrong: dict[str, tuple[list[int], list[int]]] = dataclasses.field(default_factory=dict)

    def check(self, source: str) -> None:
        """Raise UserError unless every tensor is there, fits and is used."""
        for kind, names in (("missing", self.missing), ("not understood", self.unused)):
            if names:
                raise UserError(f"{source}: {count(names, 'tensor')} {kind}: {_listed(names)}")
        if self.wrong:
            lines = [
                f"{name} is {found} instead of {expected}"
                for name, (found, expected) in self.wrong.items()
            ]
            raise UserError(f"{source}: the weights do not fit config.json: {_listed(lines)}")


def count(items: Iterable, what: str) -> str:
    """Such as "1 tensor" or "3 tensors"."""
    number = len(list(items))
    return f"{number} {what}{'' if number == 1 else 's'}"


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


class Conversion:
    """The tensors of a checkpoint under the names and in the shapes of the other side.

    Attributes:
        report: what is missing, unused or does not fit.
        targets: every tensor of the result by name, without numbers (on the meta device), with the
            dtype of the source.

    Args:
        checkpoint: what is read.
        rules: of the architecture that is not ours.
        ours: the tensors of our model by name, on the meta device.
        to_ours: the direction.
    """

    def __init__(
        self, checkpoint: Checkpoint, rules: list[Rule], ours: Mapping[str, Tensor], to_ours: bool
    ):
        self.checkpoint = checkpoint
        self.report = Report()
        self.targets: dict[str, Tensor] = {}
        self._step_of: dict[str, Step] = {}
        self._ready: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._used: set[str] = set()
        kept = [rule for rule in rules if not rule.dropped]
        _check_complete(kept, ours)
        for rule in kept:
            expected = [_meta(ours[name]) for name in rule.ours]
            if to_ours:
                step = Step(rule.theirs, rule.ours, rule.to_ours)
                expected = list(rule.to_theirs(*expected))
            else:
                step = Step(rule.ours, rule.theirs, rule.to_theirs)
            self._add(step, expected)
        self._drops = [rule for rule in rules if rule.dropped] if to_ours else []
        self._check_left()

    def _add(self, step: Step, expected: list[Tensor]) -> None:
        """Plan a step, or note why it cannot be taken; `expected` are its sources."""
        found = self.checkpoint.tensors
        fits = True
        for name, tensor in zip(step.source, expected, strict=True):
            if name not in found:
                self.report.missing.append(name)
            elif found[name].shape != tensor.shape:
                self.report.wrong[name] = list(found[name].shape), list(tensor.shape)
            else:
                continue
            fits = False
        if fits:
            results = step.apply(*(found[name] for name in step.source))
            for name, tensor in zip(step.target, results, strict=True):
                # Afresh: of a view, the size in bytes would be that of the whole.
                self.targets[name] = _meta(tensor)
                self._step_of[name] = step
        self._used.update(step.source)

    def _check_left(self) -> None:
        """Sort what no step reads into dropped and unused."""
        for name in self.checkpoint.tensors:
            if name in self._used:
                continue
            dropped = any(rule.drops(name) for rule in self._drops)
            (self.report.dropped if dropped else self.report.unused).append(name)

    def check(self) -> None:
        """Raise UserError unless all tensors are there, fit and are used, and repeats agree."""
        source = self.checkpoint.source
        self.report.check(source)
        for rule in self._drops:
            repeat = rule.theirs[0]
            if rule.repeats is None or repeat not in self.checkpoint.tensors:
                continue
            one, other = (self.checkpoint.read(name) for name in (repeat, rule.repeats))
            if not torch.equal(one.to(other.dtype), other):
                raise UserError(
                    f"{source}: config.json says that {repeat} is {rule.repeats}, but their "
                    "numbers differ"
                )

    def read(self, name: str) -> Tensor:
        """A tensor of the result, which no other one shares memory with.

        Safe from several threads. What a step makes besides is kept until it is asked for.
        """
        with self._lock:
            if name not in self._ready:
                step = self._step_of[name]
                sources = [self.checkpoint.read(source) for source in step.source]
                for target, tensor in zip(step.target, step.apply(*sources), strict=True):
                    self._ready[target] = tensor
            tensor = self._ready.pop(name)
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            return tensor if whole and tensor.is_contiguous() else _own(tensor)


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _check_complete(rules: list[Rule], ours: Mapping[str, Tensor]) -> None:
    """A map whose rules leave a tensor of ours out, or name it twice, is a bug."""
    named = [name for rule in rules for name in rule.ours]
    if sorted(named) != sorted(ours):
        difference = set(named) ^ set(ours) or {name for name in named if named.count(name) > 1}
        raise AssertionError(f"rules and model differ in {sorted(difference)[:_SHOWN]}")
