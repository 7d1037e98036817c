"""LongBench's scores against cases computed by hand."""

import pytest

from memlm.evaluation.longbench.metrics import (
    classification,
    code_similarity,
    count,
    qa_f1,
    retrieval,
    rouge_l,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat!", "a CAT", 1.0),  # articles, case and punctuation do not count
        ("black cat", "the cat sat", 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)),
        ("cat cat cat", "cat cat dog", 2 / 3),  # a word counts as often as both have it
        ("u.s. army", "US army", 1.0),
        ("", "cat", 0.0),
        ("the", "cat", 0.0),
    ],
)
def test_f1_of_words(prediction: str, reference: str, expected: float) -> None:
    assert qa_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "recall", "precision"),
    [
        ("the cat sat", "the cat sat", 1, 1),
        ("sat cat the", "the cat sat", 1 / 3, 1 / 3),  # one word in order
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4 / 5, 4 / 8),  # Lin's example
        ("the the the cat", "the cat", 1, 1),  # different words are counted
        ("The cat", "the cat", 1 / 2, 1 / 2),  # case counts
        ("the cat, sat", "the cat sat", 2 / 3, 2 / 3),  # and so do commas
        # The line end behind the last full stop is an empty word.
        ("the cat.\n", "the cat.\n", 1, 1),
        ("the cat.\n", "the cat.", 1, 2 / 3),
    ],
)
def test_rouge_l(prediction: str, reference: str, recall: float, precision: float) -> None:
    expected = 2 * precision * recall / (precision + recall + 1e-8)
    assert rouge_l(prediction, reference) == pytest.approx(expected, rel=1e-12)


def test_of_two_longest_common_subsequences_the_one_that_ends_first_in_the_answer_counts() -> None:
    # "c" or "d" could be the word in common with "c d"; of the answer "d c" it is "d". "c" is in
    # the second sentence, so that two words are hits, and one if "c" had been taken twice.
    assert rouge_l("d c. c", "c d") == pytest.approx(1.0, abs=1e-7)
    assert rouge_l("d c. d", "c d") == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize(("prediction", "reference"), [("", "a b"), ("a b", ""), ("...", "a b")])
def test_rouge_l_of_nothing_is_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == 0.0


CLASSES = ("Other location", "location", "Date", "State", "Country location")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Type: Date", "Date", 1.0),
        ("Date or State", "Date", 1 / 2),
        ("Other location", "Other location", 1.0),  # "location" is a part of the right class
        ("Other location", "location", 1 / 2),
        ("date", "Date", 0.0),
        ("State", "Date", 0.0),
        ("", "Date", 0.0),
    ],
)
def test_classification(prediction: str, reference: str, expected: float) -> None:
    assert classification(prediction, reference, CLASSES) == expected


def test_all_classes_that_are_parts_of_the_right_one_are_left_out() -> None:
    assert classification("a b c of abc", "abc", ("a", "b", "c", "abc")) == 1.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("7", 1.0), ("7 or 8", 1 / 2), ("7, 7 and 17", 2 / 3), ("17", 0.0), ("seven", 0.0)],
)
def test_numbers_of_counts_and_paragraphs(prediction: str, expected: float) -> None:
    assert count(prediction, "7") == pytest.approx(expected)
    assert retrieval(prediction, "Paragraph 7") == pytest.approx(expected)
    assert retrieval(prediction, "段落7") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("return x", "return x", 1.0),
        ("\n\nreturn x\nand more", "return x", 1.0),
        ("```python\n# a remark\nreturn x\n```", "return x", 1.0),
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("abc", "abz", 0.67),  # 2 * 2 / 6, in whole percent
        ("# nothing but a remark", "return x", 0.0),
    ],
)
def test_likeness_of_code(prediction: str, reference: str, expected: float) -> None:
    assert code_similarity(prediction, reference) == expected
