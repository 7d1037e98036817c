"""Token ids of stories."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.encoding import encode_behind, encode_prompt
from memlm.data.stories.story import Story


def answer_text(answer: str) -> str:
    """The answer as it goes on behind `question_text`."""
    return f" {answer}."


def question_text(question: str) -> str:
    """What stands behind the facts."""
    return f"\nQuestion: {question}\nAnswer:"


class StoryTokens:
    """Facts, questions and answers as token ids int64, encoded apart so that any of them join."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._ids: dict[tuple[str, str], np.ndarray] = {}

    def facts(self, facts: list[str]) -> list[np.ndarray]:
        """Ids of facts where nothing stands before the first one."""
        return [self.fact(fact, " " if place else "") for place, fact in enumerate(facts)]

    def fact(self, fact: str, space: str) -> np.ndarray:
        """Ids of a fact behind a sentence, or without space at the start of the text."""
        return self._behind("." if space else "\n", space + fact)

    def start(self) -> np.ndarray:
        """Ids in front of a text: those that the tokenizer adds."""
        return encode_prompt(self.tokenizer, "")

    def question(self, question: str) -> np.ndarray:
        """Ids of a question behind the facts."""
        return self._behind(".", question_text(question))

    def answer(self, answer: str) -> np.ndarray:
        """Ids of an answer behind its question."""
        return self._behind(":", answer_text(answer))

    def whole(self, story: Story) -> tuple[np.ndarray, int]:
        """A story with its question and answer, and how many of its last ids are the answer."""
        answer = self.answer(story.answer)
        pieces = [self.start(), *self.facts(story.facts), self.question(story.question), answer]
        return np.concatenate(pieces), len(answer)

    def _behind(self, before: str, text: str) -> np.ndarray:
        key = (before, text)
        if key not in self._ids:
            self._ids[key] = encode_behind(self.tokenizer, before, text)
        return self._ids[key]
