"""A conversation of one person with a model: its turns, and what the model carries between them."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from memlm.errors import UserError
from memlm.layers.state import MemoryState
from memlm.models import MemLMCache

_MARK = "memlm-answer-ends-here"  # stands for an answer in a chat template


@dataclasses.dataclass
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 = the most probable token.
        top_p: only the most probable tokens that have this share together.
        max_new_tokens: of an answer.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 256

    def arguments(self) -> dict[str, Any]:
        """Those of generate()."""
        if self.temperature == 0:
            chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {"do_sample": True, "temperature": self.temperature}
            chosen |= {"top_p": self.top_p, "top_k": 0}
        return chosen | {"max_new_tokens": self.max_new_tokens}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a turn has cost.

    Attributes:
        read, written: tokens.
        reading, writing: seconds until the first token of the answer, and from then on.
        stopped: whether Ctrl-C ended the answer.
    """

    read: int
    written: int
    reading: float
    writing: float
    stopped: bool


class Conversation:
    """One row of states that goes on from turn to turn.

    Args:
        model: with memories, in evaluation mode.
        tokenizer: the model's.
        sampling: how it answers.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.use_memory = True
        self.states: dict[str, MemoryState] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that have been read."""
        return 0 if self.states is None else int(self.states["position"].next_position[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in (self.states or {}).values())

    def wipe(self) -> None:
        """Forget everything."""
        self.states = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the states into a file; raises UserError as `save_memory_state`."""
        if self.states is None:
            raise UserError("nothing has been read yet, so there is nothing to save")
        self.model.save_memory_state(path, self.states)

    def load(self, path: str | os.PathLike) -> None:
        """Go on from a file; raises UserError as `load_memory_state`, the states stay then."""
        states = self.model.load_memory_state(path).states
        rows = states["position"].batch_size
        if rows != 1:
            raise UserError(f"{path}: holds {rows} conversations; save one row of them")
        self.states = states

    @torch.inference_mode()
    def answer(self, text: str, write: Callable[[str], None]) -> Turn:
        """Read a turn and answer it.

        Args:
            text: what was said.
            write: is given the answer piece by piece, never half a character.

        Raises:
            UserError: for a text without a token or that is not Unicode, or a context that the
                model does not allow; the states are those before the turn then.
        """
        ids = self._ids(text).to(self.model.device)
        streamer = _Streamer(self.tokenizer, write)
        ends = self._end_tokens()
        padding = self.tokenizer.pad_token_id
        start = time.perf_counter()
        with _interrupts() as stop:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=None if self.states is None else MemLMCache(self.states),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
                return_dict_in_generate=True,
                eos_token_id=ends or None,
                pad_token_id=padding if padding is not None or not ends else ends[0],
                use_memory=self.use_memory,
                **self.sampling.arguments(),
            )
        cache, last = output.past_key_values, output.sequences[:, -1:]
        # generate() leaves the last token unread; one that ends an answer is the template's to say.
        if int(last) not in ends:
            self.model(last, past_key_values=cache, use_memory=self.use_memory, logits_to_keep=1)
        self.states = cache.states
        return Turn(
            read=ids.shape[1],
            written=output.sequences.shape[1] - ids.shape[1],
            reading=streamer.first - start,
            writing=streamer.last - streamer.first,
            stopped=stop.asked,
        )

    def _ids(self, text: str) -> Tensor:
        """int64 [1, T], what a turn adds to the conversation."""
        begins = self.states is None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not Unicode ({error.reason})") from error
        if self.tokenizer.chat_template:
            piece, special = self._from_template(text, begins), False
        else:
            piece, special = text if begins else f"\n{text}", begins
        ids = self.tokenizer(piece, add_special_tokens=special, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise UserError("the text has no token")
        return ids

    def _from_template(self, text: str, begins: bool) -> str:
        said = {"role": "user", "content": text}
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _MARK}]
        try:
            whole = self.tokenizer.apply_chat_template(
                [said] if begins else [*before, said], add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise UserError(f"the tokenizer's chat template does not work ({error})") from error
        if begins:
            return whole
        if _MARK not in whole:
            raise UserError("the tokenizer's chat template leaves answers out")
        return whole[whole.rindex(_MARK) + len(_MARK) :]

    def _end_tokens(self) -> list[int]:
        """The tokens that end an answer."""
        own = self.model.generation_config.eos_token_id
        found = [*own] if isinstance(own, list) else [own]
        return sorted({end for end in (*found, self.tokenizer.eos_token_id) if end is not None})


class _Streamer(TextStreamer):
    """Hands text on as soon as its tokens make whole words, and takes the time.

    Attributes:
        first, last: when the first and the last token came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.first = self.last = 0.0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


class _Interrupt(StoppingCriteria):
    """Ends the answer when it has been asked to."""

    asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    """While it lasts, Ctrl-C asks the answer to end; the second one ends the program."""
    stop = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
