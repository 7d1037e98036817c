"""How the config and the weights of another architecture are called here.

Every architecture is one file that says how a config is read and written, and lists rules: which of
its tensors are which of ours, and how one becomes the other by views, splits and concatenations
alone. A rule works in both directions, so what was read is written back bit by bit.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def _unchanged(*tensors: Tensor) -> Tensors:
    return tensors


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some tensors of a checkpoint and the tensors of ours that hold the same numbers.

    Attributes:
        theirs, ours: names.
        to_ours: their tensors, in the order of their names, to ours; shapes only, no arithmetic.
        to_theirs: the inverse.
        repeats: a tensor of theirs whose numbers this one must have, where it is there.
        dropped: their tensors that nothing reads (`ours` is empty); missing ones are no error, and
            names may have * in them.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[..., Tensors] = _unchanged
    to_theirs: Callable[..., Tensors] = _unchanged
    repeats: str | None = None

    @property
    def dropped(self) -> bool:
        return not self.ours

    def drops(self, name: str) -> bool:
        """Whether it drops their tensor of that name."""
        return self.dropped and any(fnmatch.fnmatchcase(name, theirs) for theirs in self.theirs)


def renamed(theirs: str, ours: str) -> Rule:
    """One tensor under another name."""
    return Rule((theirs,), (ours,))


def dropped(*patterns: str) -> Rule:
    """Tensors that nothing reads, by names such as "mtp.*"."""
    return Rule(patterns, ())


def repeated(theirs: str, original: str) -> Rule:
    """A tensor that may be there twice, such as a tied head; refused where its numbers differ."""
    return Rule((theirs,), (), repeats=original)


def joined(theirs: Sequence[str], ours: str, sizes: Sequence[int]) -> Rule:
    """Several of theirs behind one another (dimension 0) in one of ours; sizes: of each."""
    return Rule(
        tuple(theirs),
        (ours,),
        lambda *parts: (torch.cat(parts),),
        lambda whole: whole.split(list(sizes)),
    )


def parted(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """One of theirs in several of ours, one behind the other (dimension 0); sizes: of each."""
    return Rule(
        (theirs,),
        tuple(ours),
        lambda whole: whole.split(list(sizes)),
        lambda *parts: (torch.cat(parts),),
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Another architecture.

    Attributes:
        name: its `model_type`.
        read_config: its config.json as the values of a `MemLMConfig`. Raises UserError for what
            this library cannot compute.
        rules: of a checkpoint with that config.json. They depend on nothing else, so they are the
            same in both directions.
        write_config: the config.json of a model of ours. Raises UserError for what the other side
            cannot hold. None = models are read only.
    """

    name: str
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    rules: Callable[[dict[str, Any]], list[Rule]]
    write_config: Callable[[Any], dict[str, Any]] | None = None
