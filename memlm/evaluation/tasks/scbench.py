"""SCBench: several questions about one long context, in two modes.

Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods" (2024), arXiv:2412.10319.
`multi_turn` asks each question behind the one before it and the answer to that one: the right one
(history "gold", as published by default; what the model wrote is forgotten) or the model's own
("own", without the end-of-text token that is published there). `multi_request` asks every question
from the state after the context. Both modes read the same contexts.

Five tasks make conversations of any length (memlm.evaluation.scbench.generators); all twelve read
the published rows, of which those are taken that fit a length: they are never cut, where SCBench
leaves out the middle. Templates are the published ones, scores but for the defects that
memlm.evaluation.scbench.scores names.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from memlm.errors import UserError
from memlm.evaluation.config import MULTI_TURN
from memlm.evaluation.prompts import (
    ANSWER,
    CONTEXT,
    QUESTION,
    Context,
    Question,
    Trial,
    check_writes,
    encode,
    encode_behind,
    encode_prompt,
    split_prompt,
)
from memlm.evaluation.question_files import QuestionOrder
from memlm.evaluation.scbench.conversation import Conversation, Turn
from memlm.evaluation.scbench.files import OPTION, read_conversations
from memlm.evaluation.scbench.generators import GENERATORS
from memlm.evaluation.scbench.scores import score_turn
from memlm.evaluation.scbench.templates import (
    context_text,
    new_tokens,
    request_texts,
    turn_texts,
)
from memlm.evaluation.statistics import estimate
from memlm.evaluation.tasks.base import PLAIN, PromptTask, Record, Tools
from memlm.evaluation.tasks.ruler import largest_fit

_SUBJECTS = {
    "scbench_kv": "values of keys",
    "scbench_prefix_suffix": "strings by prefix and suffix",
    "scbench_vt": "variable tracking",
    "scbench_mf": "numbers of a list",
    "scbench_many_shot": "classes from many shots",
    "scbench_repoqa": "functions of a repository",
    "scbench_qa_eng": "questions about an English book",
    "scbench_qa_chn": "questions about a Chinese book",
    "scbench_choice_eng": "multiple choice about a book",
    "scbench_summary": "summaries",
    "scbench_summary_with_needles": "summaries and pass keys",
    "scbench_repoqa_and_kv": "functions and values of keys",
}


@dataclass(frozen=True)
class TurnQuestion(Question):
    """A question that knows its turn."""

    turn: Turn


class Scbench(PromptTask):
    """One of the twelve tasks, in the mode of the config."""

    metric = "score (%)"
    kind = "shares"

    def __init__(self, name: str, tools: Tools):
        """Read the rows or choose the generator.

        Raises:
            UserError: for a task without a generator and without data, malformed rows, a length
                that no conversation fits.
        """
        super().__init__(name, tools)
        options = self.options = tools.config.scbench
        self.title = f"SCBench {name.removeprefix('scbench_')}: {_SUBJECTS[name]}"
        how = f"multi-turn, {options.history} answers in the history"
        self.description = (
            "Several questions about one context "
            f"({how if options.mode == MULTI_TURN else 'multi-request: each from the context'}); "
            "the score is the mean over the turns."
        )
        self.rows: list[Conversation] | None = None
        self.sizes: dict[int, int] = {}
        if options.data is not None:
            self.rows = read_conversations(options.data, name)
            known = [one for row in self.rows for turn in row.turns for one in turn.answers]
            measured: dict[int, int] = {}

            def tokens_of(number: int) -> int:
                if number not in measured:
                    measured[number] = self._tokens(self._cut(self.rows[number]))
                return measured[number]

            self.order = QuestionOrder(len(self.rows), self.rng(), tokens_of)
        elif name in GENERATORS:
            self.generator = GENERATORS[name]
            if options.turns > self.generator.most_turns:
                raise UserError(
                    f"scbench.turns: {options.turns} is too many for {name}; the most is "
                    f"{self.generator.most_turns}"
                )
            self.least = self.generator.least(options.turns)
            known = [one for turn in self._made(0, self.least).turns for one in turn.answers]
        else:
            raise UserError(
                f"{name}: has no generator; name SCBench's data with --{OPTION} microsoft/SCBench "
                f"or a folder with its files (without data: {', '.join(GENERATORS)})"
            )
        check_writes(tools.tokenizer, known, name)
        for length in tools.config.all_lengths:
            self.conversation(length, 0)

    def conversation(self, length: int, index: int) -> Conversation:
        """The context and turns of a trial.

        Raises:
            UserError: when the length is too short.
        """
        if self.rows is not None:
            number = self.order.pick(length, index)
            if number is None:
                raise self._too_short(length, self.order.least())
            return self._cut(self.rows[number])
        if length not in self.sizes:
            size = largest_fit(lambda size: self._tokens(self._made(0, size)), length, self.least)
            if size is None:
                raise self._too_short(length, self._tokens(self._made(0, self.least)))
            self.sizes[length] = size
        size = self.sizes[length]
        while (tokens := self._tokens(made := self._made(index, size))) > length:
            if size == self.least:
                raise self._too_short(length, tokens)
            size = max(self.least, min(size - 1, size * length // tokens))
        return made

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        conversation = self.conversation(length, index)
        text = context_text(self.name, conversation)
        if self.options.mode == MULTI_TURN:
            gold = self.options.history == "gold"
            texts = turn_texts(self.name, conversation, gold)
            ids, asked = split_prompt(self.tools.tokenizer, text, texts[:1])
            for before, behind in pairwise(texts):
                asked.append(encode_behind(self.tools.tokenizer, before if gold else ".", behind))
            follows = QUESTION if gold else ANSWER
        else:
            texts = request_texts(self.name, conversation)
            ids, asked = split_prompt(self.tools.tokenizer, text, texts)
            follows = CONTEXT
        questions = tuple(
            TurnQuestion(question, turn.answers, self._answer_tokens(turn), turn)
            for question, turn in zip(asked, conversation.turns, strict=True)
        )
        labels = {"mode": self.options.mode, "turn": list(range(1, len(questions) + 1))}
        return Trial(Context([ids]), questions, labels, follows=follows)

    def score(self, question: Question, prediction: str) -> float:
        assert isinstance(question, TurnQuestion)
        return score_turn(question.turn, prediction)

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """`turns`: the mean score of every turn, by setting, condition and number from 1."""
        scores: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(
            partial(defaultdict, partial(defaultdict, list))
        )
        for record in records:
            for turn, answer in zip(record.labels["turn"], record.answers, strict=True):
                scores[record.setting][record.condition][turn].append(answer["score"])
        found = {
            setting: {
                condition: {turn: estimate(values, self.kind) for turn, values in turns.items()}
                for condition, turns in conditions.items()
            }
            for setting, conditions in scores.items()
        }
        return {
            "mode": self.options.mode,
            "history": self.options.history if self.options.mode == MULTI_TURN else None,
            "turns": found,
        }

    def _made(self, index: int, size: int) -> Conversation:
        return self.generator.make(size, self.options.turns, self.rng(index))

    def _cut(self, conversation: Conversation) -> Conversation:
        """With as many turns as are wanted."""
        return Conversation(conversation.context, conversation.turns[: self.options.turns])

    def _tokens(self, conversation: Conversation) -> int:
        """Of the whole conversation with the right answers, and room for an answer per turn.

        The longest that the modes and histories give, so that all of them have the same contexts.
        """
        tokenizer = self.tools.tokenizer
        texts = turn_texts(self.name, conversation, gold=True)
        start = encode_prompt(tokenizer, context_text(self.name, conversation) + texts[0])
        later = sum(len(encode_behind(tokenizer, *pair)) for pair in pairwise(texts))
        return len(start) + later + sum(map(self._answer_tokens, conversation.turns))

    def _answer_tokens(self, turn: Turn) -> int:
        """As many as are published; more where a tokenizer needs more for the right answer."""
        needed = len(encode(self.tools.tokenizer, f" {turn.gold}"))
        return max(new_tokens(self.name, turn), needed)

    def _too_short(self, length: int, least: int) -> UserError:
        return UserError(
            f"{self.name}: lengths: {length} tokens are too short for a conversation with this "
            f"tokenizer; use at least {least}"
        )
