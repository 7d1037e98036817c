"""How the config and the weights of another architecture are called here.

Every architecture is one file that says how a config is read and written, and lists rules: which of
its tensors are which of ours, and how one becomes the other by views, splits and concatenations
alone. A rule works in both directions, so what was read is written back bit by bit.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
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


def interleaved(theirs: str, ours: Sequence[str], groups: int, sizes: Sequence[int]) -> Rule:
    """One of theirs whose dimension 0 is groups, such as heads, that hold rows of each of ours.

    Args:
        theirs: [groups * sum(sizes), ...].
        ours: names of tensors [groups * size, ...].
        groups: how many.
        sizes: rows of each of ours in a group.
    """

    def to_ours(whole: Tensor) -> Tensors:
        parts = whole.unflatten(0, (groups, sum(sizes))).split(list(sizes), 1)
        return tuple(part.flatten(0, 1) for part in parts)

    def to_theirs(*parts: Tensor) -> Tensors:
        grouped = [
            part.unflatten(0, (groups, size)) for part, size in zip(parts, sizes, strict=True)
        ]
        return (torch.cat(grouped, 1).flatten(0, 1),)

    return Rule((theirs,), tuple(ours), to_ours, to_theirs)


def stacked(theirs: Sequence[Sequence[str]], ours: str) -> Rule:
    """Matrices of experts in one tensor of ours.

    Args:
        theirs: for each expert the names of its matrices, which have one shape and stand behind one
            another.
        ours: name of the tensor [experts, rows of all matrices of an expert, columns].
    """
    each = len(theirs[0])

    def to_ours(*matrices: Tensor) -> Tensors:
        return (torch.stack(matrices).unflatten(0, (len(theirs), each)).flatten(1, 2),)

    def to_theirs(whole: Tensor) -> Tensors:
        return tuple(matrix for expert in whole for matrix in expert.chunk(each))

    names = tuple(name for expert in theirs for name in expert)
    return Rule(names, (ours,), to_ours, to_theirs)


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
        observe: a config.json with what only the tensors of that checkpoint tell (names and
            shapes, on the meta device), as `read_config` and `rules` then get it.
    """

    name: str
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    rules: Callable[[dict[str, Any]], list[Rule]]
    write_config: Callable[[Any], dict[str, Any]] | None = None
    observe: Callable[[dict[str, Any], Mapping[str, Tensor]], dict[str, Any]] | None = None
