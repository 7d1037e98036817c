"""One call of a model with an attached memory, as its attention layers see it."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.layers.state import MemoryState
from memlm.models.key_values import KeyValues

States = dict[str, MemoryState]


class AttachedCall:
    """What the hooks on the attention layers work with during one call.

    Attributes:
        last_hidden: [B, T, hidden_size], what the decoder gave to the head, where an output memory
            asks for it.

    Args:
        branches: the memories by the number of their layer.
        states: the memories' states at the start of the call; never changed.
        context: positions and documents of the call.
        key_values: the masks and, with `carries`, the cache of the attention layers.
        carries: whether keys and values go in and out.
        use_memory: False leaves the memories out.
    """

    def __init__(
        self,
        branches: nn.ModuleDict,
        states: States,
        context: CallContext,
        key_values: KeyValues,
        carries: bool,
        use_memory: bool,
    ):
        self.branches = branches
        self.states = states
        self.context = context
        self.key_values = key_values
        self.carries = carries
        self.use_memory = use_memory
        self.last_hidden: Tensor | None = None
        self._new: States | None = dict(states)

    def attention_arguments(
        self, index: int, cache_argument: str, hidden: Tensor, kwargs: dict
    ) -> dict[str, Any]:
        """The keyword arguments of a layer's attention, with the call's cache and mask."""
        kwargs = dict(kwargs)
        if self.carries:
            kwargs[cache_argument] = self.key_values
        own = kwargs.get("attention_mask")
        kwargs["attention_mask"] = self.key_values.mask(index, own, hidden.dtype)
        return kwargs

    def read(self, index: int, hidden: Tensor) -> Tensor | None:
        """What the memory of a layer adds to its attention's output; None for nothing."""
        if self.context.layout.num_tokens == 0:  # nothing but padding
            return None
        name = state_name(index)
        own = {name: self.states[name]} if name in self.states else {}
        branch = self.branches[str(index)]
        added, new = branch(hidden, name, own, self.context, self.use_memory)
        # Gradient checkpointing runs layers again after the call: their states are known by then.
        if self._new is not None:
            self._new.update(new)
        return added

    def again(self, shared: dict[Any, Any]) -> "AttachedCall":
        """The same call for a layer that runs again: it finds `shared`, and shares nothing."""
        call = copy.copy(self)
        call.context = dataclasses.replace(self.context, shared=dict(shared))
        return call

    def finish(self) -> States:
        """The memories' new states. The call keeps none of them, as they hold its graph."""
        new, self._new = self._new, None
        return new

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, the hooks work for this call; calls may be nested."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[AttachedCall | None] = ContextVar("attached_call", default=None)


def state_name(index: int) -> str:
    """The name of the state of the memory at a layer."""
    return f"{index}.memory"


class AttentionHook:
    """The hooks on the attention of one layer."""

    def __init__(self, index: int, cache_argument: str):
        self.index = index
        self.cache_argument = cache_argument

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give the attention the cache and the mask of the call."""
        hidden = _hidden(args, kwargs)
        call = _active()
        return args, call.attention_arguments(self.index, self.cache_argument, hidden, kwargs)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add what the memory of this layer reads from the attention's input."""
        added = _active().read(self.index, _hidden(args, kwargs))
        if added is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)


def keep_last_hidden(module: nn.Module, args: tuple, output: Any) -> None:
    """The hook on the decoder of a model with an output memory."""
    _active().last_hidden = output[0]


class CallCheckpoint:
    """A checkpoint function whose recomputation runs inside the call it belongs to.

    Raises:
        UserError: for a reentrant one: its layers run without gradients the first time, so what
            memories hand to later layers and calls would have none.
    """

    def __init__(self, function: Callable):
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "gradient checkpointing with use_reentrant=True loses the gradients of what "
                "memories share and carry; use use_reentrant=False"
            )
        self.function = function

    def __call__(self, layer: Callable, *args: Any) -> Any:
        return self.function(_InCall(_active(), layer), *args)


class _InCall:
    """A layer that runs inside a call, and finds there the same each time it runs."""

    def __init__(self, call: AttachedCall, layer: Callable):
        self.call, self.layer, self.runs = call, layer, 0
        self.shared = dict(call.context.shared)

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        call = self.call if self.runs == 1 else self.call.again(self.shared)
        with call.active():
            return self.layer(*args)


def _active() -> AttachedCall:
    call = _ACTIVE.get()
    if call is None:
        raise UserError(
            "a decoder layer with a memory ran outside its model; call the model itself, or "
            "detach_memory() first"
        )
    return call


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
