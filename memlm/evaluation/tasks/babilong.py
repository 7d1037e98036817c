"""BABILong: facts of a bAbI story scattered in a book, and a question about them.

Twenty question types (Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context
Reasoning-in-a-Haystack", 2024, arXiv:2406.10149), with the stories of bAbI (Weston et al., 2015) or
of a simulated world. Prompts are BABILong's. What differs:

- Lengths are those of whole prompts in the model's own tokens, where BABILong counts the text alone
  in tokens of GPT-2 and allows 300 more.
- The text is one stretch of the haystack with all its sentences and blank lines; BABILong leaves
  out sentences of less than 10 tokens. Facts stand at the ends of sentences behind uniform places
  in tokens, where BABILong draws among the sentences.
- Answers are scored as there, but labels count as whole words (see `is_right`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.babilong.labels import LABELS, answer_labels, is_right
from memlm.evaluation.babilong.prompts import likely_answers, prompt_end, prompt_start
from memlm.evaluation.babilong.scatter import ScatteredFacts
from memlm.evaluation.babilong.stories import Story, find_stories, read_stories
from memlm.evaluation.prompts import (
    Context,
    Question,
    Trial,
    check_writes,
    encode,
    encode_behind,
    encode_prompt,
)
from memlm.evaluation.tasks.base import ABSENT, PLAIN, PromptTask, Record, Tools

_SUBJECTS = (
    "single supporting fact",
    "two supporting facts",
    "three supporting facts",
    "two-argument relations",
    "three-argument relations",
    "yes-no questions",
    "counting",
    "lists and sets",
    "simple negation",
    "indefinite knowledge",
    "basic coreference",
    "conjunction",
    "compound coreference",
    "time reasoning",
    "basic deduction",
    "basic induction",
    "positional reasoning",
    "size reasoning",
    "path finding",
    "agents' motivations",
)
_NEW_TOKENS = 20  # BABILong's
_SPARE = 8  # tokens for names that are longer than those of the examples
_TRIES = 64  # simulated stories, until one is short enough


class Babilong(PromptTask):
    """One question type, `babilong_qa1` to `babilong_qa20`.

    An answer has 20 tokens, as in BABILong, or more where the tokenizer needs more for an answer
    in the form that the prompt asks for (bytes).
    """

    description = (
        "Facts of a story stand between the sentences of a long text, in order, and a question "
        "follows from them. An answer counts when it names the right label and no other. There are "
        "few labels, so guesses are right at times; absent prompts tell how often."
    )
    metric = "accuracy (%)"
    variants = (ABSENT,)

    def __init__(self, name: str, tools: Tools):
        """Read the stories.

        Raises:
            UserError: for files that are no bAbI stories, or a length that fits none of them.
        """
        super().__init__(name, tools)
        self.number = int(name.removeprefix("babilong_qa"))
        self.title = f"BABILong qa{self.number}: {_SUBJECTS[self.number - 1]}"
        tokenizer = tools.tokenizer
        check_writes(tokenizer, LABELS[self.number], name)
        self.start = encode_prompt(tokenizer, prompt_start(self.number))
        longest = max(len(encode(tokenizer, answer)) for answer in likely_answers(self.number))
        self.new_tokens = _NEW_TOKENS if longest <= _NEW_TOKENS else longest + _SPARE
        self.scattered = ScatteredFacts(tools)
        self.fitting: dict[int, list[Story]] = {}
        self.stories: list[Story] | None = None
        self.source = "simulated world"
        if tools.config.babilong.stories is not None:
            path = find_stories(tools.config.babilong.stories, self.number)
            self.source, self.stories = path.name, self._checked(read_stories(path), str(path))
        checked = 0
        for length in tools.config.all_lengths:
            # Of a file all trials take those that fit; of a world each draws its own. What fits
            # fits longer lengths as well.
            trials = tools.config.trials_at(length) if self.stories is None else 1
            for index in range(checked, trials):
                self._story(length, index)
            checked = max(checked, trials)

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        story = self._story(length, index)
        question = self._question(story)
        rng = self.rng(length, index)
        body = length - len(self.start) - len(question) - self.new_tokens
        if variant == ABSENT:
            pieces, starts = self.scattered.pieces([], body, rng)
        else:
            pieces, starts = self.scattered.pieces(story.facts, body, rng)
        context = Context([self.start, *pieces])
        labels: dict[str, Any] = {"facts": len(starts)}
        told = []
        if starts:
            told = [
                (story.facts[place], len(self.start) + starts[place]) for place in story.supporting
            ]
            last = starts[story.supporting[-1]]
            labels |= {"depth": round(last / body, 1), "distance": body - last}
        return Trial(
            context,
            (Question(question, (story.answer,), self.new_tokens),),
            labels,
            self.scattered.excerpt(context, told, len(self.start)),
        )

    def score(self, question: Question, prediction: str) -> float:
        asked = self.tools.tokenizer.decode(question.token_ids.tolist())
        return float(is_right(self.number, asked, question.references[0], prediction))

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """Where the stories are from, and the score of giving the most frequent answer always."""
        answers = {
            (record.setting, record.trial): record.answers[0]["references"][0] for record in records
        }
        most = max(Counter(answers.values()).values(), default=0)
        return {
            "stories": self.source,
            "labels": list(LABELS[self.number]),
            "constant_answer": most / max(len(answers), 1),
        }

    def _checked(self, stories: list[Story], where: str) -> list[Story]:
        """The stories in an order drawn from the seed; every answer has to be a label."""
        labels = {label.lower() for label in LABELS[self.number]}
        for story in stories:
            if not answer_labels(self.number, story.answer) <= labels:
                raise UserError(
                    f"babilong.stories: {where}: the answer {story.answer!r} to "
                    f"{story.question!r} is none of qa{self.number} (valid: "
                    f"{', '.join(LABELS[self.number])})"
                )
        return [stories[place] for place in self.rng().permutation(len(stories))]

    def _story(self, length: int, index: int) -> Story:
        """Story `index` of those whose facts fit into a length; the same one at every length where
        it does, unless stories are used up."""
        if self.stories is None:
            for story in self._simulated(index):
                if self._least(story) <= length:
                    return story
            trials = range(max(index + 1, self.tools.config.trials_at(length)))
            least = max(min(map(self._least, self._simulated(one))) for one in trials)
        else:
            if length not in self.fitting:
                self.fitting[length] = [
                    story for story in self.stories if self._least(story) <= length
                ]
            fitting = self.fitting[length]
            if fitting:
                return fitting[index % len(fitting)]
            least = min(map(self._least, self.stories))
        raise UserError(
            f"{self.name}: lengths: {length} tokens are too short for the prompt and the facts of "
            f"any story; use at least {least}"
        )

    def _simulated(self, index: int) -> Iterator[Story]:
        from memlm.evaluation.babilong.world import make_story

        for attempt in range(_TRIES):
            yield make_story(self.number, self.rng(index, attempt))

    def _least(self, story: Story) -> int:
        """Tokens of a prompt with the facts alone."""
        question = self._question(story)
        facts = sum(map(len, self.scattered.facts(story.facts)))
        return len(self.start) + facts + len(question) + self.new_tokens

    def _question(self, story: Story) -> np.ndarray:
        return encode_behind(self.tools.tokenizer, ".", prompt_end(story.question))
