"""The contract of a memory, and the table of memories by name."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from memlm.errors import UserError, nearest
from memlm.layers.attention_weights import AttentionWeights
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.state import MemoryState
from memlm.specification import build_config

__all__ = [
    "AttendingMemory",
    "CallContext",
    "MemoryConfig",
    "MemoryModule",
    "MemoryState",
    "SequenceLayout",
    "memory_class",
    "memory_config",
    "memory_names",
    "register",
]


@dataclasses.dataclass(kw_only=True)
class MemoryConfig:
    """What every memory can be told in `layers`.

    Attributes:
        parallel: at the `memory` site, read the mixer's normed input instead of its output.
        gate: start value of a learned gain per channel on the branch; 0.0 starts at exactly the
            base model's logits (to add a memory to a pretrained model), None has no gain.
        share: layers with the same name use one owner (a value table, this call's retrievals).
    """

    parallel: bool = False
    gate: float | None = None
    share: str | None = None

    @property
    def delay(self) -> int:
        """Tokens until what was written can be read; attention has to see as far."""
        return 1

    @property
    def attention_window(self) -> int | None:
        """Tokens that the attention inside sees; None without one."""
        return None

    def check_sizes(self, hidden_size: int) -> None:
        """Raise UserError for sizes that cannot work in a model of width `hidden_size`."""

    def for_attention(self, weights: AttentionWeights) -> Self:
        """This config beside an attention with those weights: sizes left open become its own."""
        return self


class MemoryModule(nn.Module, ABC):
    """A branch that reads, and mostly writes, a memory.

    Laws (tests/memory/contract.py): what a token sees depends only on its position in its
    document, never on how the calls were cut; rows and documents never mix; `forward` never
    changes the state it is given.
    """

    config_class: ClassVar[type[MemoryConfig]]
    name: ClassVar[str]
    # Set by the model where an earlier layer has the same `share` and keeps what is shared.
    follows = False
    # Whether `forward` deals with `context.sequence`. Otherwise the processes that hold rows
    # together run it in turn, each from the state that the one before hands on. Then it is given
    # the state at the start of the whole rows, has to make every collective also where its own
    # columns are nothing but padding, and its new state on the last process has to be that of the
    # whole rows; what the others return is not used.
    shares_sequence = False

    def __init__(self, config: MemoryConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__()
        config.check_sizes(hidden_size)
        self.config = config
        self.hidden_size = hidden_size
        self.norm_eps = norm_eps

    @classmethod
    def build(
        cls, config: MemoryConfig, hidden_size: int, norm_eps: float = 1e-6
    ) -> "MemoryModule":
        """The module of a config; a memory with variants chooses its class here."""
        return cls(config, hidden_size, norm_eps)

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState | None:
        """The state before the first token; None for a memory that carries nothing.

        Reads no parameter: learned initial values are substituted in `forward`.
        """

    @abstractmethod
    def forward(
        self, hidden: Tensor, state: MemoryState | None, context: CallContext
    ) -> tuple[Tensor, MemoryState | None]:
        """Read and write.

        Args:
            hidden: [B, T, hidden_size].
            state: the carried state of the B rows.
            context: the documents of the call; with `context.write` False the same state object
                comes back.

        Returns:
            The branch [B, T, hidden_size] (zero at padding is not required) and the new state.
        """

    @abstractmethod
    def init_weights(self) -> None:
        """Set every own parameter with functions of `transformers.initialization`.

        Those leave loaded weights alone; linear layers and norms are set before this is called.
        """

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """Start from the weights of the attention beside it, where this memory has use for them.

        `MemoryConfig.for_attention` gives the sizes that fit; with others nothing is changed.
        """

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating point operations of one forward pass over `tokens` tokens of one row."""

    @classmethod
    def build_shared(cls, config: MemoryConfig, hidden_size: int) -> nn.Module | None:
        """The module that all layers with the same `share` use; the model owns it and hands it
        over as `context.shared[config.share]`. None when only results of a call are shared.
        """
        return None


class AttendingMemory(MemoryModule):
    """A memory with an attention of its own, which goes on when the memory is off.

    What the attention carries is kept apart from the memory's state, under a name of its own: to
    reset, swap or freeze memories leaves it as it is, as with attention at the mixer site.
    """

    @abstractmethod
    def init_attention_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState:
        """The attention's state before the first token."""

    @abstractmethod
    def forward(
        self,
        hidden: Tensor,
        state: MemoryState,
        context: CallContext,
        attention_state: MemoryState,
        use_memory: bool = True,
    ) -> tuple[Tensor, MemoryState, MemoryState]:
        """Read and write; with `use_memory` False only attend, and return `state` as it is.

        Returns:
            The branch [B, T, hidden_size], the new state and the attention's new state.
        """


_MEMORIES: dict[str, type[MemoryModule]] = {}


def register(
    name: str, config_class: type[MemoryConfig]
) -> Callable[[type[MemoryModule]], type[MemoryModule]]:
    """Class decorator that puts a memory into the table under `name`."""

    def add(cls: type[MemoryModule]) -> type[MemoryModule]:
        cls.name = name
        cls.config_class = strict(config_class)
        _MEMORIES[name] = cls
        return cls

    return add


def memory_names() -> list[str]:
    """The names of all registered memories."""
    return sorted(_MEMORIES)


def memory_class(name: str, where: str = "memory") -> type[MemoryModule]:
    """The module class registered under `name`.

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    if name not in _MEMORIES:
        valid = ", ".join(memory_names())
        raise UserError(
            f"{where}: unknown memory {name!r}{nearest(name, _MEMORIES)} (valid: {valid})"
        )
    return _MEMORIES[name]


def memory_config(spec: dict[str, Any], where: str = "memory") -> MemoryConfig:
    """The config of a memory from its entry in `layers`, `{type: NAME, ...}`.

    Raises:
        UserError: for an unknown memory, an unknown key or a value of the wrong type.
    """
    values = dict(spec)
    cls = memory_class(values.pop("type"), where)
    return build_config(cls.config_class, values, where)
