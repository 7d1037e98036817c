"""What RULER's tasks share: templates, scores, and the search for the size of a prompt.

RULER is Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(2024), arXiv:2404.06654. Templates and answer prefixes are those of its repository, word for word
(see NOTICE). A prompt is a template with its answer prefix; the model goes on where the prefix
ends, and a length counts the prompt and `tokens_to_generate` tokens.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        if high_tokens <= low_tokens and high > budget:
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
