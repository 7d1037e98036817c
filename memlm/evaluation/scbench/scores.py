"""How SCBench scores an answer (compute_scores.py of its repository, see NOTICE).

What differs from there, because the published code compares with single characters of the right
answer and accepts almost anything: an answer of many_shot is right when the first option in it,
"(B)", is the right one; an answer of qa_chn is compared with the whole right answer. Functions of
repoqa are taken from the first code block as it stands, where the published code looks for the
first function in it with a parser.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from memlm.evaluation.scbench.conversation import Turn

_NUMBER = re.compile(r"\d+\.\d+|\d+")
_OPTION = re.compile(r"\([A-Z]\)")
_CODE = re.compile(r"^```(?:\w+)?\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PUNCTUATION = set(string.punctuation) | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕"
    "〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_SIMILAR = 0.8  # BLEU from which a function counts as the same
_LETTERS = "ABCD"


def score_turn(turn: Turn, prediction: str) -> float:
    """Between 0 and 1, by the score of the turn's task."""
    return _SCORES[turn.task](turn, prediction)


def contains(turn: Turn, prediction: str) -> float:
    """1 when the answer contains the right one."""
    return float(turn.answers[0] in prediction)


def contains_any(turn: Turn, prediction: str) -> float:
    """1 when the answer contains one of the right ones, upper and lower case alike."""
    return float(any(answer.upper() in prediction.upper() for answer in turn.answers))


def contains_share(turn: Turn, prediction: str) -> float:
    """The share of the right answers that the answer contains, upper and lower case alike."""
    found = [answer.lower() in prediction.lower() for answer in turn.answers]
    return sum(found) / len(found)


def first_number(turn: Turn, prediction: str) -> float:
    """1 when the first number in the answer is the right one.

    Where that is written without decimals, those of the answer are cut off, as published.
    """
    found = _NUMBER.search(prediction)
    if found is None:
        return 0.0
    wanted = float(turn.answers[0])
    number = float(found.group())
    return float((int(number) if turn.answers[0].lstrip("+-").isdigit() else number) == wanted)


def first_digits(turn: Turn, prediction: str) -> float:
    """1 when the first run of digits in the answer is the right one."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found.group() == turn.answers[0])


def option(turn: Turn, prediction: str) -> float:
    """1 when the first "(B)" in the answer is the right one; other answers are looked for."""
    if not _OPTION.fullmatch(turn.answers[0].strip()):
        return contains_any(turn, prediction)
    found = _OPTION.search(prediction)
    return float(found is not None and found.group() == turn.answers[0].strip())


def choice(turn: Turn, prediction: str) -> float:
    """1 when the answer starts with the right letter, is the right text, or names either."""
    right = (turn.answers[0], _LETTERS[turn.options.index(turn.answers[0])])
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in _LETTERS:
        return float(text[0] in right)
    if text in right:
        return 1.0
    text = " ".join(re.sub("[\"'.,?!{}]", " ", text).split())
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        place = text.find(prefix)
        if place >= 0:
            return float(text[place + len(prefix) :].lstrip().startswith(right))
    letters = [word for word in text.split() if len(word) == 1 and word in _LETTERS]
    return float(bool(letters) and letters[0] in right)


def characters_f1(turn: Turn, prediction: str) -> float:
    """F1 of the characters that answer and right answer have in common (Chinese)."""
    found, wanted = (_plain_characters(text) for text in (prediction, turn.answers[0]))
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _plain_characters(text: str) -> list[str]:
    return [one for one in text.lower() if one not in _PUNCTUATION and not one.isspace()]


def rouge_lsum(turn: Turn, prediction: str) -> float:
    """ROUGE-L of summaries whose sentences are lines, F1 (Lin, 2004, equations 2 to 4)."""
    lines = [
        [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n")]
        for text in (turn.answers[0], prediction)
    ]
    reference, found = lines
    left = [Counter(word for line in text for word in line) for text in lines]
    total = sum(sum(counts.values()) for counts in left)
    hits = 0
    for line in reference:
        places = set().union(*(_common_places(line, other) for other in found))
        for place in sorted(places):
            # A word counts as often as both texts have it.
            if left[0][line[place]] > 0 and left[1][line[place]] > 0:
                left[0][line[place]] -= 1
                left[1][line[place]] -= 1
                hits += 1
    return 2 * hits / total if hits else 0.0


def _common_places(first: Sequence[str], second: Sequence[str]) -> set[int]:
    """Places in `first` of a longest common subsequence with `second`."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            grown = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = grown
    places, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def function(turn: Turn, prediction: str) -> float:
    """1 when the answer is like the right function, more than like the others (RepoQA)."""
    blocks = _CODE.findall(prediction.strip())
    code = (blocks[0] if blocks else prediction).split()
    likeness = bleu(code, turn.answers[0].split())
    return float(
        likeness >= _SIMILAR and all(likeness > bleu(code, one.split()) for one in turn.others)
    )


def bleu(words: Sequence[str], reference: Sequence[str]) -> float:
    """BLEU with n-grams of 1 to 4 words (Papineni et al., 2002), 0 where one has no match."""
    logs = 0.0
    for size in range(1, 5):
        counts, wanted = (
            Counter(tuple(text[at : at + size]) for at in range(len(text) - size + 1))
            for text in (words, reference)
        )
        matches = sum((counts & wanted).values())
        if matches == 0:
            return 0.0
        logs += math.log(matches / sum(counts.values())) / 4
    return math.exp(logs + min(0.0, 1 - len(reference) / len(words)))


_SCORES: dict[str, Callable[[Turn, str], float]] = {
    "scbench_kv": contains,
    "scbench_prefix_suffix": contains,
    "scbench_vt": contains_share,
    "scbench_repoqa": function,
    "scbench_qa_eng": contains_any,
    "scbench_qa_chn": characters_f1,
    "scbench_choice_eng": choice,
    "scbench_many_shot": option,
    "scbench_mf": first_number,
    "scbench_summary": rouge_lsum,
    "scbench_passkey": first_digits,
}
