"""How LongBench scores an answer (metrics.py and eval.py of its repository, see NOTICE).

Each function compares an answer with one right answer and gives a number between 0 and 1; of
several right answers the best one counts. One thing differs from there: of the classes that an
answer names, the published code forgets to leave out some that are parts of the right one, as it
removes from the list that it goes through.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SMALL = 1e-8  # keeps the F-measure of ROUGE-L finite, and lowers it a little


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words in common, without case, punctuation and articles (SQuAD)."""
    found, wanted = (
        _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
        for text in (prediction, reference)
    )
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of summaries (Lin, 2004, section 3.2) as the package rouge 1.0.1 computes it.

    Sentences end with full stops; every different word counts once, over all sentences. A word is
    a hit when it stands in a longest common subsequence of any two sentences.
    """
    found, wanted = _sentences(prediction), _sentences(reference)
    hits: set[str] = set()
    for sentence in wanted:
        for other in found:
            hits |= _common_words(sentence, other)
    if not hits:
        return 0.0
    recall, precision = (
        len(hits) / len({word for words in text for word in words}) for text in (wanted, found)
    )
    return 2 * precision * recall / (precision + recall + _SMALL)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space alone has an empty word, as in the package."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence: that which ends first in `second`."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        row, above = table[i + 1], table[i]
        for j, other in enumerate(second):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    words, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """One over the number of classes that the answer names, 0 when the right one is not there.

    Classes whose names are parts of the right one's do not count.
    """
    named = [one for one in classes if one in prediction]
    named = [one for one in named if one == reference or one not in reference]
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the answer that are the right one."""
    return _share_of_numbers(prediction, reference)


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same, where the right one is that of a paragraph: "Paragraph 3", "段落3"."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    return 0.0 if found is None else _share_of_numbers(prediction, found[1])


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Likeness of the first line of code in whole percent (difflib, as in fuzzywuzzy).

    A line with `, # or // is none.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("`|#|//", line)), "")
    if code == reference:
        return 1.0
    if not code or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100


Metric = Callable[[str, str, Sequence[str]], float]
