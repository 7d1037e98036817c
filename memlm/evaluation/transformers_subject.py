"""Any causal language model of transformers, read in segments as a model with memories is.

What a model carries from call to call, and whether its code goes on from there with many tokens or
only with one, differs between architectures. It is found out by trying: see `Reading`.
"""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from memlm.errors import UserError
from memlm.evaluation.conditions import Pass, Plan, control_passes
from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.costs import StateBytes
from memlm.evaluation.subject import Subject
from memlm.models.decoder_layers import position_limit

# Names of states that hold everything read in a constant size.
_RECURRENT = ("cache_params", "state")
_LIMITS = ("n_positions", "max_seq_len", "n_ctx")
# A trial of a way of reading: two segments, then single tokens.
_TRIAL = (6, 6, 1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model is read so that it says what it says to the whole text in one call.

    Attributes:
        pieces: "segments" = any number of tokens go on from a state; "tokens" = only the first call
            takes many, then one at a time; "whole" = nothing is carried: everything is read again.
        together: whether the rows of a batch may share a call; else each has its own.
    """

    pieces: str
    together: bool = True

    @property
    def note(self) -> str | None:
        """What a reader of the costs has to know."""
        if self.pieces == "whole":
            return (
                "transformers carries no state of this model from call to call: for every new "
                "token all the text is read again."
            )
        parts = []
        if self.pieces == "tokens":
            parts.append(
                "the code of transformers loses this model's state when it goes on with several "
                "tokens: after the first segment it is read token by token (a larger --segment "
                "is faster and takes more memory)"
            )
        if not self.together:
            parts.append(
                "the code of transformers mixes up the rows of a batch of this model: they are "
                "read one by one"
            )
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}." if text else None


_READINGS = [
    Reading("segments"),
    Reading("tokens"),
    Reading("segments", together=False),
    Reading("tokens", together=False),
    Reading("whole"),
]


@dataclasses.dataclass
class Carried:
    """Where one call's rows stand.

    Attributes:
        rows: of the calls.
        cache: what the last output carried, by the name of the argument that takes it.
        tokens: how many were read.
        ids: int64 [B, T], all of them, where nothing else can be carried.
    """

    rows: int
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    ids: Tensor | None = None


class TransformersSubject(Subject):
    """A causal language model without a memory of this library: a baseline.

    The states are a list of `Carried`, one for all rows or one for each; what `read`, `step` and
    `score` are given is used up.

    Attributes:
        reading: how the model is read.
    """

    ragged = False
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        segment: int,
        conditions: Sequence[str] = ALL_CONDITIONS,
        name: str = "model",
        source: str | None = None,
    ):
        """Find out how the model is read.

        Args:
            model: in evaluation mode.
            tokenizer, segment, name, source: see `Subject`.
            conditions: those that are wanted.

        Raises:
            UserError: for a model that is not causal or cannot run.
        """
        super().__init__(model, tokenizer, Plan((), (), None, ()), segment, name, source)
        self.arguments = set(inspect.signature(model.forward).parameters)
        self.reading, carried = self._find_reading()
        reach = _attention_reach(carried)
        notes = ("The model has no memory: off, reset and swapped do not apply.", self.reading.note)
        self.plan = Plan(
            (Pass(("on",)), *control_passes(conditions)), (), reach, tuple(filter(None, notes))
        )

    @property
    def max_context(self) -> int | None:
        reach = self.plan.attention_reach
        if reach == 0:
            return None  # a recurrent model's config may still name the length of its training
        limit, always = position_limit(self.model)
        config = self.model.config.get_text_config(decoder=True)
        names = iter(_LIMITS)
        while limit is None and (name := next(names, None)):
            limit = getattr(config, name, None)
        return limit if always or reach is None else None

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config(decoder=True).vocab_size

    def read(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool) -> Any:
        return self._call(self.reading, tokens, states, keep=None)[1]

    def step(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        logits, states = self._call(self.reading, tokens, states, keep=1)
        return logits[:, -1], states

    def score(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        return self._call(self.reading, tokens, states, keep=0)

    def fork(self, states: Any) -> Any:
        # Layers of this kind replace their keys and values and never write into them.
        shared = {
            id(tensor): tensor
            for state in states
            for cache in state.cache.values()
            if isinstance(cache, Cache)
            for layer in cache.layers
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        }
        return copy.deepcopy(states, shared)

    def state_bytes(self, states: Any) -> StateBytes:
        key_values = total = rows = 0
        for state in states:
            rows += state.rows
            for name, tensor in _tensors([state.cache, state.ids]):
                total += tensor.nbytes
                key_values += tensor.nbytes if name in ("keys", "values") else 0
        return StateBytes(0, key_values // rows, total // rows)

    @torch.inference_mode()
    def _call(
        self, reading: Reading, tokens: Tensor, states: list[Carried] | None, keep: int | None
    ) -> tuple[Tensor | None, list[Carried]]:
        """Logits behind the last `keep` of `tokens` (0 = all, None = no logits), and the states."""
        parts = [tokens] if reading.together else list(tokens.split(1))
        states = states or [Carried(len(part)) for part in parts]
        advance = self._read_again if reading.pieces == "whole" else self._go_on
        found = [
            advance(reading, part, state, keep) for part, state in zip(parts, states, strict=True)
        ]
        logits = None if keep is None else torch.cat([part for part, _ in found])
        return logits, [state for _, state in found]

    def _go_on(self, reading: Reading, tokens: Tensor, state: Carried, keep: int | None):
        at_once = reading.pieces == "segments" or not state.tokens
        logits: list[Tensor] = []
        for piece in [tokens] if at_once else tokens.split(1, dim=1):
            # Without a wish for logits a single one is the least that a model can give.
            output = self._forward(piece, state.cache, state.tokens, 1 if keep is None else keep)
            if keep != 0:
                logits.clear()
            logits.append(output.logits)
            carried = {
                name: value
                for name, value in output.items()
                if name in self.arguments and value is not None
            }
            state = Carried(state.rows, carried, state.tokens + piece.shape[1])
        return torch.cat(logits, dim=1)[:, -(keep or 0) :], state

    def _read_again(self, reading: Reading, tokens: Tensor, state: Carried, keep: int | None):
        ids = tokens if state.ids is None else torch.cat([state.ids, tokens], dim=1)
        logits = None
        if keep is not None:
            keep = keep or tokens.shape[1]
            logits = self._forward(ids, {}, 0, keep, use_cache=False).logits[:, -keep:]
        return logits, Carried(state.rows, tokens=ids.shape[1], ids=ids)

    def _forward(
        self, tokens: Tensor, cache: dict[str, Any], position: int, keep: int, use_cache=True
    ):
        """The model's output; every position's logits where it cannot leave any out."""
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        offered = {
            "use_cache": use_cache,
            "position_ids": positions.expand(len(tokens), -1),
            "logits_to_keep": keep,
        }
        given = {name: value for name, value in offered.items() if name in self.arguments}
        return self.model(tokens, **given, **cache)

    def _find_reading(self) -> tuple[Reading, dict[str, Any]]:
        """The first of `_READINGS` that agrees with one call, and what it carries.

        Raises:
            UserError: for a model that is not causal, or gives no numbers.
        """
        length, first = sum(_TRIAL), _TRIAL[0]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (2, length), generator=generator).to(self.device)
        kind = type(self.model).__name__
        whole = Reading("whole")
        second = slice(first, first + _TRIAL[1])
        try:
            logits, beginning = (
                self._call(whole, part, None, keep=0)[0] for part in (tokens, tokens[:, :first])
            )
            with torch.inference_mode():
                forgotten = self._forward(tokens[:, second], {}, first, 0, use_cache=False).logits
        except Exception as error:  # code of any kind may run here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"model: {self.name}, a {kind}, cannot run here ({reason})") from error
        if bool(logits.isnan().any()):
            raise UserError(f"model: {self.name}, a {kind}, gives no numbers (its logits are NaN)")
        # Small beside what a lost state would do, but no smaller than rounding.
        exact = self.model.dtype in (torch.float32, torch.float64)
        share, rounding = (0.005, 1e-5) if exact else (0.1, 0.02)
        tolerance = max(rounding, share * _apart(forgotten, logits[:, second]))
        if not _apart(beginning, logits[:, :first]) <= tolerance:
            raise UserError(
                f"model: {self.name}, a {kind}, looks at later tokens, so it is no causal language "
                "model"
            )
        for reading in _READINGS[:-1]:
            try:
                found, states = [], None
                for piece in tokens.split(_TRIAL, dim=1):
                    part, states = self._call(reading, piece, states, keep=0)
                    found.append(part)
                read = torch.cat(found, dim=1)
            except Exception:  # code that cannot go on in this way fails in its own way
                continue
            if (
                states[0].cache
                and read.shape == logits.shape
                and all(
                    _apart(read[:, part], logits[:, part]) <= tolerance
                    for part in (second, slice(second.stop, length))
                )
            ):
                return reading, states[0].cache
        return whole, {}


def _apart(first: Tensor, second: Tensor) -> float:
    """How far logits [B, T, vocabulary] are apart, as a share of their spread: median of all."""
    first, second = (part.double().masked_fill(part.isinf(), 0.0) for part in (first, second))
    spread = (second - second.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((first - second).norm(dim=-1) / spread.clamp(min=1e-30)).median())


def _attention_reach(cache: dict[str, Any]) -> int | None:
    """How many tokens back attention looks through all layers, from what a model carries.

    None = everything, 0 = there is no attention.
    """
    for name, carried in cache.items():
        if not isinstance(carried, Cache):
            return 0 if name in _RECURRENT else None
        reach = 0
        for layer in carried.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                reach += layer.sliding_window - 1
            elif isinstance(layer, DynamicLayer) or not isinstance(
                layer, LinearAttentionCacheLayerMixin
            ):
                return None
        return reach
    return None


def _tensors(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator:
    """The tensors inside anything that a model carries, each once, with their attributes' names."""
    seen = set() if seen is None else seen
    if value is None or isinstance(value, type) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.ndim:  # a lone number says nothing about a row
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, str(key), seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, name, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), name, seen)
