"""A model that is evaluated, whatever its kind: read contexts, fork, ask."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memlm.evaluation.conditions import Pass, Plan
from memlm.evaluation.costs import Meter, StateBytes
from memlm.evaluation.prompts import ANSWER, CONTEXT, Context, Question, Trial

# Logits held at a time when every position is scored: 0.25 GB of float32.
_LOGITS = 1 << 26


class Subject(ABC):
    """A model, its tokenizer, and what can be done to its memory.

    Attributes:
        model: in evaluation mode.
        tokenizer: what it was trained with; None where token ids are all there is.
        name: what reports call it.
        source: folder or Hub id; None for a model in memory.
        tokenizer_source: the same of the tokenizer, as `load_tokenizer` takes it.
        plan: the conditions that apply.
        segment: tokens of a context that are read at a time.
        ragged: whether the rows of a batch may have contexts and questions of different lengths.
    """

    ragged: bool = True
    tokenizer_source: str | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        plan: Plan,
        segment: int,
        name: str = "model",
        source: str | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.segment = segment
        self.name = name
        self.source = source

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        return self.model.device

    @property
    @abstractmethod
    def max_context(self) -> int | None:
        """Longest prompt in tokens; None where nothing limits it."""

    @abstractmethod
    def read(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool) -> Any:
        """The states after one more segment.

        Args:
            tokens: int64 [B, T].
            mask: bool [B, T], False at padding on the right; None = no padding.
            states: what the last call returned; None at the start of the documents.
            use_memory: False = memories give zero.
        """

    @abstractmethod
    def step(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        """Logits [B, vocabulary] behind the last column, and the states after it.

        Arguments as in `read`, but padding stands on the left and `states` may be used up.
        """

    @abstractmethod
    def score(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        """Logits [B, T, vocabulary] behind every column, and the states after the last.

        Arguments as in `read`; `states` may be used up.
        """

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Logits per token."""

    def fork(self, states: Any) -> Any:
        """States that may be gone on from while `states` stays as it is."""
        return states

    def ablate(self, states: Any, condition: str) -> Any:
        """The states that `condition` goes on from; `states` itself is left as it was."""
        return self.plan.ablate(states, condition)

    @abstractmethod
    def state_bytes(self, states: Any) -> StateBytes:
        """Bytes of the states of one row."""

    def ask(self, trials: Sequence[Trial], one: Pass, meter: Meter) -> dict[str, list[list[str]]]:
        """Answers by condition, trial and question: each context is read once for all of them.

        What is done to the memories for a condition is done once, between a context and its first
        question.
        """
        if not self.ragged:
            return self._ask_alike(trials, one, meter)
        return self._ask_together(trials, one, meter)

    def _ask_alike(self, trials, one: Pass, meter: Meter) -> dict[str, list[list[str]]]:
        """Rows of the same lengths are read together, the others apart.

        Answers that are read on have lengths of their own.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, trial in enumerate(trials):
            shape = (len(trial.context), *(len(asked.token_ids) for asked in trial.questions))
            if trial.follows == ANSWER:
                shape = (index,)
            groups.setdefault(shape, []).append(index)
        found: dict[str, list[list[str]]] = {}
        for group in groups.values():
            answers = self._ask_together([trials[index] for index in group], one, meter)
            for condition, rows in answers.items():
                places = found.setdefault(condition, [[] for _ in trials])
                for index, row in zip(group, rows, strict=True):
                    places[index] = row
        return found

    def _ask_together(self, trials, one: Pass, meter: Meter) -> dict[str, list[list[str]]]:
        with one.ablation():
            contexts = [trial.context for trial in trials]
            with meter.measure("read", sum(map(len, contexts))):
                states = self.read_contexts(contexts, one.use_memory, meter.advance)
            meter.saw(self.state_bytes(states))
            most = max(len(trial.questions) for trial in trials)
            rounds = [(condition, number) for condition in one.conditions for number in range(most)]
            found: dict[str, list[list[str]]] = {
                name: [[] for _ in trials] for name in one.conditions
            }
            for condition, number in rounds:
                if number == 0:
                    start = self.ablate(states, condition)
                # Only what is asked again has to be kept.
                last = (condition, number) == rounds[-1]
                written = self._answer(
                    trials, number, start if last else self.fork(start), one, meter
                )
                for row, ids in enumerate(written):
                    if number < len(trials[row].questions):
                        found[condition][row].append(self.decode(ids))
                if trials[0].follows != CONTEXT and number + 1 < most:
                    start = self._after_turn(trials, number, written, start, one, meter)
                    meter.saw(self.state_bytes(start))
        return found

    def _after_turn(
        self,
        trials,
        number: int,
        written: list[list[int]],
        states: Any,
        one: Pass,
        meter: Meter,
    ) -> Any:
        """The states after question `number` and, where it is kept, what was written to it.

        Read again: while the others still write, the states of a row that has ended are spoilt.
        `states`, where the question was asked, stays as it is.
        """
        turns = []
        for question, trial, ids in zip(_asked(trials, number), trials, written, strict=True):
            kept = ids if trial.follows == ANSWER else []
            turns.append(Context([question.token_ids, np.asarray(kept, dtype=np.int64)]))
        with meter.measure("read", sum(map(len, turns))):
            return self.read_contexts(turns, one.use_memory, states=self.fork(states))

    def _answer(self, trials, number: int, states: Any, one: Pass, meter: Meter) -> list[list[int]]:
        """What each row writes to its question `number`; `states` may be used up."""
        asked = _asked(trials, number)
        new_tokens = [question.new_tokens for question in asked]
        questions = [question.token_ids for question in asked]
        with meter.measure("generate", 0):
            written = self.generate(questions, states, max(new_tokens), one.use_memory)
        written = [ids[:most] for ids, most in zip(written, new_tokens, strict=True)]
        meter.tokens["generate"] += sum(
            len(ids)
            for ids, trial in zip(written, trials, strict=True)
            if number < len(trial.questions)
        )
        return written

    def read_contexts(
        self,
        contexts: Sequence[Context],
        use_memory: bool = True,
        progress: Callable[[int], None] = lambda tokens: None,
        states: Any = None,
    ) -> Any:
        """The states after reading whole contexts, one segment held at a time.

        `progress` is told the tokens read after every segment; `states` is where the rows stand
        and may be used up, None = at the start of the documents.
        """
        longest = max(map(len, contexts))
        for start in range(0, longest, self.segment):
            parts = [context.read(start, start + self.segment) for context in contexts]
            tokens, mask = pad(parts, left=False)
            states = self.read(*self._place(tokens, mask), states, use_memory)
            progress(sum(map(len, parts)))
        return states

    def generate(
        self, questions: Sequence[np.ndarray], states: Any, new_tokens: int, use_memory: bool = True
    ) -> list[list[int]]:
        """The most likely continuation of each question, token by token, to the end-of-text token.

        Args:
            questions: int64 [T] per row.
            states: after the contexts; used up where `fork` copies.
            new_tokens: most tokens of a continuation.
            use_memory: False = memories give zero.
        """
        tokens, mask = self._place(*pad(questions, left=True))
        ends = set(self.end_ids())
        written: list[list[int]] = [[] for _ in questions]
        open_rows = set(range(len(questions)))
        for _ in range(new_tokens):
            logits, states = self.step(tokens, mask, states, use_memory)
            tokens, mask = logits.argmax(-1, keepdim=True), None
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in open_rows and token in ends:
                    open_rows.discard(row)
                elif row in open_rows:
                    written[row].append(token)
            if not open_rows:
                break
        return written

    def guess(self, tokens: Tensor, states: Any, use_memory: bool = True) -> tuple[Tensor, Any]:
        """The most likely token after each of `tokens` (int64 [B, T]), int64 [B, T] on the CPU.

        And the states after the last of them; `states` may be used up.
        """
        guesses = []
        for part in tokens.split(self.logits_at_once(len(tokens)), dim=1):
            logits, states = self.score(part.to(self.device), None, states, use_memory)
            guesses.append(logits.argmax(-1).cpu())
        return torch.cat(guesses, dim=1), states

    def logits_at_once(self, rows: int) -> int:
        """Positions of `rows` rows whose logits are held at a time."""
        return max(1, _LOGITS // (rows * self.vocabulary))

    def end_ids(self) -> list[int]:
        """Token ids that end an answer: the tokenizer's end-of-text token, and the model's."""
        generation = getattr(self.model, "generation_config", None)
        found = [self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
        return [int(token) for ids in found if ids is not None for token in np.atleast_1d(ids)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _place(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return tokens.to(self.device), None if mask is None else mask.to(self.device)


class MemorySubject(Subject):
    """A model of this library, or one with an attached memory. Its states are never changed.

    Attributes:
        call_model: gives the output of the model; it is called itself unless this is replaced.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.call_model: Callable[..., Any] = model

    @property
    def max_context(self) -> int | None:
        return self.model.max_context

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    def read(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool) -> Any:
        return self._call(tokens, mask, states, use_memory).memory_states

    def step(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        output = self._call(tokens, mask, states, use_memory)
        return output.logits[:, -1], output.memory_states

    def score(self, tokens: Tensor, mask: Tensor | None, states: Any, use_memory: bool):
        output = self._call(tokens, mask, states, use_memory, logits_to_keep=0)
        return output.logits, output.memory_states

    def _call(self, tokens, mask, states: Any, use_memory: bool, logits_to_keep: int = 1):
        return self.call_model(
            input_ids=tokens,
            attention_mask=None if mask is None else mask.long(),
            memory_states=states,
            use_memory=use_memory,
            logits_to_keep=logits_to_keep,
            return_memory_states=True,
        )

    def state_bytes(self, states: Any) -> StateBytes:
        sizes = {name: state.nbytes // state.batch_size for name, state in states.items()}
        memory = sum(sizes[name] for name in self.plan.memory_names)
        total = sum(sizes.values())
        return StateBytes(memory, total - memory, total)


def _asked(trials: Sequence[Trial], number: int) -> list[Question]:
    """Question `number` of every trial; one with fewer repeats its last one, unheard."""
    return [trial.questions[min(number, len(trial.questions) - 1)] for trial in trials]


def pad(rows: Sequence[np.ndarray], left: bool) -> tuple[Tensor, Tensor | None]:
    """Ids int64 [B, T]; where rows differ in length, also the mask bool [B, T] of real tokens."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), length) if left else slice(0, len(ids))
        tokens[row, place] = torch.from_numpy(ids)
        mask[row, place] = True
    return tokens, None if bool(mask.all()) else mask
