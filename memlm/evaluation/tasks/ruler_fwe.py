"""RULER's frequent words: coded words whose numbers follow a zeta distribution.

The most frequent word is "...", which the prompt says to ignore; the next three are asked for.
"""

import string

import numpy as np

from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.ruler import TEMPLATES, Draft, SizedTask

NOISE = "..."
ASKED = 3  # words
LETTERS = 6  # of a coded word
TOKENS_PER_WORD = 50  # of a prompt, for each word of the vocabulary
ALPHA = 2.0
_ZETA = np.pi**2 / 6  # zeta(2): the sum of rank ** -ALPHA over all ranks
_EXCERPT = 300  # characters
_TEMPLATE = TEMPLATES["freq_words_extraction"]
_BEFORE, _AFTER = (_TEMPLATE.template + _TEMPLATE.answer_prefix).split("{context}")


class FrequentWords(SizedTask):
    """fwe: the three most frequent coded words."""

    title = "RULER fwe: frequent words"
    description = (
        "A text of coded words, frequent and rare ones; the score is the share of the three most "
        "frequent words that the answer contains, in RULER's prompt."
    )
    kind = "shares"
    alike = False  # the tokens of a few words are most of a prompt
    new_tokens = _TEMPLATE.tokens_to_generate
    # From this size on the numbers of the first five words differ, so there is one right answer.
    least = 53

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self.check_lengths()

    def draft(self, length: int, index: int, variant: str, size: int) -> Draft:
        rng = self.rng(length, index)
        vocabulary = max(ASKED + 2, (length - self.new_tokens) // TOKENS_PER_WORD)
        words = [NOISE, *coded_words(vocabulary - 1, rng)]
        drawn = rng.permutation(np.repeat(words, frequencies(size, vocabulary))).tolist()
        text = " ".join(drawn)
        return Draft(
            _BEFORE + text,
            _AFTER,
            words[1 : 1 + ASKED],
            {"vocabulary": vocabulary, "words": len(drawn)},
            f"... {text[-_EXCERPT:]}",
        )


def coded_words(count: int, rng: np.random.Generator) -> list[str]:
    """Different words of six random letters."""
    codes = rng.choice(len(string.ascii_lowercase) ** LETTERS, size=count, replace=False)
    digits = codes[:, None] // len(string.ascii_lowercase) ** np.arange(LETTERS)
    letters = np.array(list(string.ascii_lowercase))[digits % len(string.ascii_lowercase)]
    return ["".join(word) for word in letters.tolist()]


def frequencies(size: int, vocabulary: int) -> np.ndarray:
    """How often each word stands in a text, by rank: a zeta distribution, rounded down.

    Args:
        size: of the text; the number of words if nothing were rounded down.
        vocabulary: number of ranks.

    Returns:
        int64 [vocabulary]; 0 for the last ranks of a large vocabulary.
    """
    ranks = np.arange(1, vocabulary + 1)
    return (size * ranks**-ALPHA / _ZETA).astype(np.int64)
