"""What RULER's tasks share: templates, scores, and the search for the size of a prompt.

RULER is Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(2024), arXiv:2404.06654. Templates and answer prefixes are those of its repository, word for word
(see NOTICE). A prompt is a template with its answer prefix; the model goes on where the prefix
ends, and a length counts the prompt and `tokens_to_generate` tokens.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from memlm.errors import UserError
from memlm.evaluation.prompts import Question, Trial, check_writes, encode_prompt, text_trial
from memlm.evaluation.tasks.base import PLAIN, PromptTask, Tools

# A line of the haystack of niah_single_1 and of vt.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class RulerTemplate:
    """The prompt of a kind of task.

    Attributes:
        template: with the fields {context} and, where there is one, {query}.
        answer_prefix: what the answer starts with; part of the prompt.
        tokens_to_generate: most tokens of an answer.
    """

    template: str
    answer_prefix: str
    tokens_to_generate: int


TEMPLATES = {
    "niah": RulerTemplate(
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are "
        "all the special magic {type_needle_v} for {query} mentioned in the provided text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are",
        128,
    ),
    "variable_tracking": RulerTemplate(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
        "above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
        "variables are assigned the value {query}, they are: ",
        30,
    ),
    "common_words_extraction": RulerTemplate(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most "
        "common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "freq_words_extraction": RulerTemplate(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. {context}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    "qa": RulerTemplate(
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the "
        "question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {query}",
        " Answer:",
        32,
    ),
}


def largest_fit(
    tokens_of: Callable[[int], int], budget: int, least: int, step: int = 1
) -> int | None:
    """The largest size least, least + step, ... whose prompt has at most `budget` tokens.

    The size is doubled until it is too large; then the place of the budget between the two is
    guessed from the token counts, which are nearly linear, and halved where guessing is slow. So a
    prompt is tokenised a few times only, and the search ends for every tokenizer.

    Args:
        tokens_of: tokens of the prompt of a size; grows with the size.
        budget: most tokens.
        least: the smallest size, in the unit of `step`.
        step: distance between sizes, at least 1.

    Returns:
        The size; None when the prompt of size `least` is too long.
    """
    low, low_tokens = 0, tokens_of(least)
    if low_tokens > budget:
        return None
    high, high_tokens = 1, tokens_of(least + step)
    while high_tokens <= budget:
        # A prompt that does not grow would never be too long.
        if high_tokens <= low_tokens and high > budget + 1000:
            raise ValueError("the prompt does not grow with its size")
        low, low_tokens = high, high_tokens
        high *= 2
        high_tokens = tokens_of(least + high * step)
    guesses = 0
    while high - low > 1:
        share = (budget - low_tokens) / (high_tokens - low_tokens)
        middle = low + round(share * (high - low)) if guesses % 3 < 2 else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        tokens = tokens_of(least + middle * step)
        guesses += 1
        if tokens <= budget:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return least + low * step


def clean(prediction: str) -> str:
    """An answer without white space around it, every control character a line end."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that the answer contains, upper and lower case alike."""
    answer = clean(prediction).lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer contains any of the references, upper and lower case alike, else 0."""
    answer = clean(prediction).lower()
    return float(any(reference.lower() in answer for reference in references))


@dataclass(frozen=True)
class Draft:
    """A prompt as text.

    Attributes:
        context, question: the question starts behind the hidden text and ends with the answer
            prefix.
        references: what the answer is compared with.
        labels, excerpt: see `Trial`.
        spare: tokens that another variant of the same trial has more than this one.
    """

    context: str
    question: str
    references: Sequence[str]
    labels: dict[str, Any] = field(default_factory=dict)
    excerpt: str = ""
    spare: int = 0


@dataclass(frozen=True)
class _Scale:
    """How prompts of one length grow.

    Attributes:
        size: the largest that fits the trial that is measured.
        smallest: tokens of the smallest prompt of that trial.
        rate: tokens per unit of size, above 0.
    """

    size: int
    smallest: int
    rate: float


class SizedTask(PromptTask):
    """A task whose prompts are as long as the length allows.

    The size of trial 0 is searched once per length. Other trials start from it, corrected by how
    much longer or shorter their keys and values are, and shrink while they are too long; all
    variants of a trial get the same size but for rounding.

    Attributes:
        alike: whether all trials grow at the same rate; otherwise the size of each is searched.
        least: the smallest size of a prompt.
        new_tokens: most tokens of an answer.
    """

    alike: ClassVar[bool] = True
    least: int = 1
    new_tokens: int

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self._scales: dict[tuple[int, int], _Scale] = {}

    @abstractmethod
    def draft(self, length: int, index: int, variant: str, size: int) -> Draft:
        """The prompt of a size; a pure function of the seed and the arguments."""

    def score(self, question: Question, prediction: str) -> float:
        return match_all(prediction, question.references)

    def check_lengths(self) -> None:
        """Raise UserError for a length that the smallest prompt of a trial does not fit, or for a
        tokenizer that cannot write the answers."""
        for length in self.tools.config.all_lengths:
            references = self.draft(length, 0, PLAIN, self.least).references
            check_writes(self.tools.tokenizer, references, self.name)
            # Where there is plenty of room, the other trials fit as well.
            roomy = 2 * self._tokens(length, 0, self.least) <= length
            if not roomy and self._most_tokens(length) > length:
                raise self._too_short(length)

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        scale = self._scale(length, 0 if self.alike else index)
        smallest = self._tokens(length, index, self.least)
        size = max(self.least, scale.size + int((scale.smallest - smallest) / scale.rate))
        while True:
            draft = self.draft(length, index, variant, size)
            trial = text_trial(
                self.tools.tokenizer,
                draft.context,
                [(draft.question, draft.references)],
                self.new_tokens,
                draft.labels,
                draft.excerpt,
            )
            tokens = len(trial.context) + len(trial.questions[0].token_ids) + self.new_tokens
            excess = tokens + draft.spare - length
            # What another variant has more is estimated; the smallest prompts are known to fit.
            if excess <= 0 or (size == self.least and tokens <= length):
                return trial
            if size == self.least:
                raise self._too_short(length)
            size = max(self.least, size - max(1, round(excess / scale.rate)))

    def _scale(self, length: int, index: int) -> _Scale:
        if (length, index) not in self._scales:
            known: dict[int, int] = {}

            def tokens_of(size: int) -> int:
                if size not in known:
                    known[size] = self._tokens(length, index, size)
                return known[size]

            size = largest_fit(tokens_of, length, self.least)
            if size is None:
                if self._most_tokens(length) > length:
                    raise self._too_short(length)
                size = self.least
            grown = max(size, self.least + 1)
            rate = (tokens_of(grown) - known[self.least]) / (grown - self.least)
            self._scales[length, index] = _Scale(size, known[self.least], max(rate, 1e-3))
        return self._scales[length, index]

    def _most_tokens(self, length: int) -> int:
        """Of the smallest prompts of all trials of a length, each variant made itself."""
        return max(
            self._tokens(length, index, self.least, variant)
            for index in range(self.tools.config.trials_at(length))
            for variant in (PLAIN, *self.variants)
        )

    def _tokens(self, length: int, index: int, size: int, variant: str | None = None) -> int:
        """Of a variant of a trial, the answer included; None = of the longest, estimated."""
        draft = self.draft(length, index, variant or PLAIN, size)
        ids = encode_prompt(self.tools.tokenizer, draft.context + draft.question)
        return len(ids) + self.new_tokens + (0 if variant else draft.spare)

    def _too_short(self, length: int) -> UserError:
        # Other lengths have other keys, so the length that is named is tried itself.
        needed = length
        while (most := self._most_tokens(needed)) > needed:
            needed = most
        return UserError(
            f"{self.name}: lengths: {length} tokens are too short for its smallest prompt with "
            f"this tokenizer; use at least {needed}"
        )


def around(text: str, start: int, stop: int, margin: int = 120) -> str:
    """`text` from `start` to `stop` and `margin` characters on each side, for an excerpt."""
    return text[max(0, start - margin) : stop + margin]
