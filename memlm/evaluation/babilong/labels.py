"""The possible answers of every question type, and when an answer of a model is right."""

import re

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")

LABELS: dict[int, tuple[str, ...]] = {
    **dict.fromkeys((1, 2, 3, 4, 11, 12, 13), _PLACES),
    5: ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys((6, 9, 17, 18), _YES_NO),
    7: ("none", "one", "three", "two"),
    8: ("apple", "football", "milk", "nothing"),
    10: ("maybe", *_YES_NO),
    14: ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    15: ("cat", "mouse", "sheep", "wolf"),
    16: ("gray", "green", "white", "yellow"),
    19: ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    20: ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}


def answer_labels(number: int, answer: str) -> set[str]:
    """The labels that a right answer names: lists are split at their commas, paths are not.

    Args:
        number: of the question type, 1 to 20.
        answer: as a story gives it, "kitchen", "apple,milk" or "s,w".
    """
    answer = answer.lower()
    return {answer} if number == 19 else {part.strip() for part in answer.split(",")}


def found_labels(number: int, text: str) -> set[str]:
    """The labels of a question type, in lower case, that stand in `text` as whole words.

    A plural s is no other word: "Wolves are afraid of cats." names "cat". Two paths may overlap:
    "n,w,s" names both "n,w" and "w,s".
    """
    text = text.lower()
    names = {label.lower() for label in LABELS[number]}
    return {
        name for name in names if re.search(rf"(?<![a-z0-9]){re.escape(name)}s?(?![a-z0-9])", text)
    }


def is_right(number: int, question: str, answer: str, prediction: str) -> bool:
    """Whether a prediction names the labels of the answer and no other label.

    What stands behind the first full stop, or where the model starts an example or a context of
    its own, does not count; nor do labels that the question itself names.

    BABILong's own comparison looks for labels as parts of words. Then "I do not know" answers
    "no", "Alfred" names "Fred", and "none" is never right in qa7, for "one" is found in it too.
    Here labels are words. Of the 99,504 answers to qa1 to qa5 that BABILong's repository holds, 12
    are judged differently.

    Args:
        number: of the question type, 1 to 20.
        question: as it was asked.
        answer: as the story gives it.
        prediction: what the model wrote.
    """
    said = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    named = found_labels(number, said) - found_labels(number, question)
    return named == answer_labels(number, answer)
