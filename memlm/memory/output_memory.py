"""The contract of an output memory, and the table of output memories by name.

An output memory stands behind the head of a model and changes the distribution of the next token:
p' = (1 - weight) p_model + weight p_memory.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from memlm.errors import UserError, nearest
from memlm.layers.context import CallContext
from memlm.layers.state import MemoryState
from memlm.specification import build_config

# The site in a config, and the name of the state.
OUTPUT = "output"
# In `CallContext.shared`: a function that returns the fingerprint of the model's weights.
WEIGHTS = "weights.fingerprint"
# Numbers in one block of scores or probabilities: 16 MB of float32.
BLOCK = 1 << 22


@dataclasses.dataclass(kw_only=True)
class OutputMemoryConfig:
    """What every output memory can be told in `output`.

    Attributes:
        weight: share of the memory in the distribution, at least 0 and below 1; 0 is exactly the
            model without it.
        temperature: the scores of what was found are divided by it before the softmax.
    """

    weight: float = 0.25
    temperature: float = 1.0

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        if not 0 <= self.weight < 1:
            raise UserError(f"weight is {self.weight}, it must be at least 0 and below 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, it must be positive")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What some tokens of a call found.

    Attributes:
        scores: [B, t, K] float32 (float64 of float64 hidden states), before the temperature; -inf
            where there is no entry.
        tokens: int64 [B, t, K], the token that followed each entry; any number where there is none.
    """

    scores: Tensor
    tokens: Tensor

    @property
    def found(self) -> Tensor:
        """bool [B, t], tokens with at least one entry."""
        return (self.scores > -torch.inf).any(-1)

    def split(self, size: int) -> Iterator["Evidence"]:
        """The same of at most `size` tokens at a time."""
        parts = (part.split(size, 1) for part in (self.scores, self.tokens))
        return (Evidence(*part) for part in zip(*parts, strict=True))

    def shares(self, temperature: float) -> Tensor:
        """[B, t, K], the softmax over the entries; 1 / K each where there is none."""
        scores = self.scores.masked_fill(~self.found.unsqueeze(-1), 0)
        return (scores / temperature).softmax(-1)

    def log_probability(self, targets: Tensor, temperature: float) -> Tensor:
        """log p_memory of one token each (int64 [B, t]); -inf where there is no entry of it."""
        same = self.tokens == targets.unsqueeze(-1)
        scores = self.scores / temperature
        matching = scores.masked_fill(~same, -torch.inf).logsumexp(-1)
        everything = scores.logsumexp(-1)
        return torch.where(matching > -torch.inf, matching - everything, -torch.inf)


class OutputMemory(nn.Module, ABC):
    """Finds hidden states like the present one, and what followed them.

    The laws of memories hold (tests/memory/contract.py): what a token sees depends only on its
    position in its document, rows and documents never mix, a given state is never changed.
    """

    config_class: ClassVar[type[OutputMemoryConfig]]
    name: ClassVar[str]

    def __init__(self, config: OutputMemoryConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState | None:
        """The state before the first token; None for a memory that carries nothing."""

    @abstractmethod
    def read(
        self,
        hidden: Tensor,
        state: MemoryState | None,
        context: CallContext,
        columns: Tensor,
    ) -> tuple[Iterator[Evidence], MemoryState | None]:
        """Search and write.

        Args:
            hidden: [B, T, hidden_size], input of the head; all of it is written.
            state: the carried state of the B rows.
            context: the documents and tokens of the call; with `context.write` False the same
                state object comes back.
            columns: int64 [N], the tokens of the call whose next token is predicted.

        Returns:
            The evidence of `columns`, in that order, in blocks of them; and the new state.
        """

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating point operations of the search for `tokens` tokens of one row."""

    def store_fingerprint(self) -> str | None:
        """What tells the store on disk that it reads from others; None without one."""
        return None

    def forward(
        self,
        hidden: Tensor,
        logits: Tensor,
        state: MemoryState | None,
        context: CallContext,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState | None]:
        """Change the distributions of the next token.

        Args:
            hidden: [B, T, hidden_size], input of the head.
            logits: [B, N, V].
            state: the carried state of the B rows.
            context: the documents and tokens of the call.
            columns: int64 [N], the tokens of the call that `logits` belong to; None = all.

        Returns:
            Log-probabilities [B, N, V] (the given logits where a token found nothing) and the new
            state. With a weight of 0 the given objects.
        """
        if self.config.weight == 0 or hidden.shape[1] == 0:
            return logits, state
        if columns is None:
            columns = torch.arange(hidden.shape[1], device=hidden.device)
        # Scores and probabilities need float32 where autocast would choose less.
        with torch.autocast(hidden.device.type, enabled=False):
            blocks, state = self.read(hidden, state, context, columns)
            mixed, start = [], 0
            for evidence in blocks:
                for part in evidence.split(max(1, BLOCK // logits[:, 0].numel())):
                    end = start + part.tokens.shape[1]
                    mixed.append(interpolate(logits[:, start:end], part, self.config))
                    start = end
        return torch.cat(mixed, 1) if mixed else logits, state


def interpolate(logits: Tensor, evidence: Evidence, config: OutputMemoryConfig) -> Tensor:
    """log((1 - weight) p_model + weight p_memory), [B, t, V] in the dtype of `logits`.

    Where a token found nothing there is no p_memory, and its logits are returned.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    shares = evidence.shares(config.temperature).to(wide)
    found = evidence.found.unsqueeze(-1)
    tokens = torch.where(evidence.scores > -torch.inf, evidence.tokens, 0)
    memory = torch.zeros_like(logits, dtype=wide).scatter_add(-1, tokens, shares)
    # The clamp keeps the gradient of a probability of 0 finite.
    log_memory = memory.clamp(min=torch.finfo(wide).tiny).log()
    log_memory = log_memory.masked_fill(memory == 0, -torch.inf)
    base = logits.to(wide).log_softmax(-1) + math.log1p(-config.weight)
    mixed = torch.logaddexp(base, log_memory + math.log(config.weight))
    return torch.where(found, mixed.to(logits.dtype), logits)


def init_output_states(
    memory: OutputMemory | None,
    batch_size: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, MemoryState]:
    """The state of a model's output memory by its name; empty where there is none."""
    state = None if memory is None else memory.init_state(batch_size, device, dtype)
    return {} if state is None else {OUTPUT: state}


def apply_output_memory(
    memory: OutputMemory | None,
    hidden: Tensor,
    logits: Tensor,
    states: dict[str, MemoryState] | None,
    context: CallContext,
    use_memory: bool = True,
    logits_to_keep: int | Tensor = 0,
) -> tuple[Tensor, dict[str, MemoryState]]:
    """What a model does behind its head.

    Args:
        memory: the output memory of the model, if there is one.
        hidden: [B, T, hidden_size], input of the head for all tokens of the call.
        logits: [B, N, V], output of the head for the tokens that are kept.
        states: the states before the call; one without the memory's is as new.
        context: the documents and tokens of the call.
        use_memory: False leaves logits and state as they are.
        logits_to_keep: the last so many tokens (0 = all), or their indices, as the model was told.

    Returns:
        The new logits, and the memory's new state by its name (empty for one without a state).
    """
    if memory is None:
        return logits, {}
    state = (states or {}).get(OUTPUT)
    if state is None:
        state = memory.init_state(hidden.shape[0], hidden.device, hidden.dtype)
    if use_memory:
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, state = memory(hidden, logits, state, context, columns[kept])
    return logits, {} if state is None else {OUTPUT: state}


_OUTPUT_MEMORIES: dict[str, type[OutputMemory]] = {}


def register_output(
    name: str, config_class: type[OutputMemoryConfig]
) -> Callable[[type[OutputMemory]], type[OutputMemory]]:
    """Class decorator that puts an output memory into the table under `name`."""

    def add(cls: type[OutputMemory]) -> type[OutputMemory]:
        cls.name = name
        cls.config_class = strict(config_class)
        _OUTPUT_MEMORIES[name] = cls
        return cls

    return add


def output_memory_names() -> list[str]:
    """The names of all registered output memories."""
    return sorted(_OUTPUT_MEMORIES)


def output_memory_config(
    spec: str | dict[str, Any], where: str = OUTPUT
) -> tuple[str, OutputMemoryConfig]:
    """Name and config of an output memory from its entry, NAME or `{type: NAME, ...}`.

    Raises:
        UserError: for an unknown memory (with the nearest one), an unknown key or a wrong value.
    """
    spec = {"type": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise UserError(f"{where}: expected a name or a mapping with `type: NAME`, got {spec!r}")
    values = dict(spec)
    name = values.pop("type")
    if name not in _OUTPUT_MEMORIES:
        valid = ", ".join(output_memory_names())
        raise UserError(
            f"{where}: unknown output memory {name!r}{nearest(name, _OUTPUT_MEMORIES)} "
            f"(valid: {valid})"
        )
    config = build_config(_OUTPUT_MEMORIES[name].config_class, values, where)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return name, config


def build_output_memory(
    spec: str | dict[str, Any] | None, hidden_size: int, where: str = OUTPUT
) -> OutputMemory | None:
    """The output memory of an entry; None of None.

    Raises:
        UserError: as `output_memory_config`.
    """
    if spec is None:
        return None
    name, config = output_memory_config(spec, where)
    return _OUTPUT_MEMORIES[name](config, hidden_size)
