"""English words for keys and lists: those of the package wonderwords, as RULER uses them."""

from functools import cache
from importlib import resources

import numpy as np

from memlm.errors import UserError

_FILES = {"noun": "nounlist.txt", "adjective": "adjectivelist.txt", "verb": "verblist.txt"}


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """All words of a kind ("noun", "adjective", "verb"), sorted, none twice.

    Raises:
        UserError: when wonderwords is not installed.
    """
    try:
        folder = resources.files("wonderwords.assets")
    except ModuleNotFoundError as error:
        raise UserError("this task needs wonderwords: pip install wonderwords") from error
    text = folder.joinpath(_FILES[kind]).read_text(encoding="utf-8")
    return tuple(sorted({line.rstrip() for line in text.splitlines() if line.strip()}))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs together, sorted, none twice; raises like `word_list`."""
    return tuple(sorted({word for kind in _FILES for word in word_list(kind)}))


def adjective_noun(rng: np.random.Generator) -> str:
    """A word such as "quizzical-aardvark", each of the six million with the same chance.

    The list of all of them is never made: no two pairs give the same word.
    """
    parts = (word_list("adjective"), word_list("noun"))
    return "-".join(part[int(rng.integers(len(part)))] for part in parts)
