"""SCBench's scores, with values by hand."""

import math

import pytest

from memlm.evaluation.scbench.conversation import Turn
from memlm.evaluation.scbench.scores import bleu, score_turn

OPTIONS = ("Al", "Bo", "Jo", "Mo")
CODE = "def f ( x ) : return x + 1"

CASES = [
    ("scbench_kv", ("ab-c",), "value ab-c.", 1),
    ("scbench_kv", ("ab-c",), "AB-C", 0),
    ("scbench_vt", ("AA", "BB", "CC", "DD"), "aa, cc", 0.5),
    ("scbench_qa_eng", ("Jo March",), "It was JO MARCH.", 1),
    ("scbench_qa_eng", ("Jo March",), "Jo", 0),
    ("scbench_mf", ("12",), "the number is 12.7, not 13", 1),
    ("scbench_mf", ("12",), "13, not 12", 0),
    ("scbench_mf", ("12.5",), "12.5", 1),
    ("scbench_mf", ("12.5",), "12", 0),
    ("scbench_mf", ("3.0",), "3.7", 0),
    ("scbench_mf", ("3.0",), "3", 1),
    ("scbench_mf", ("12",), "none", 0),
    ("scbench_passkey", ("123",), "It is 123.4", 1),
    ("scbench_passkey", ("123",), "1234", 0),
    ("scbench_many_shot", ("(B)",), " (B)\n\nObject (A)", 1),
    # An opening bracket or a letter alone is enough for the published code.
    ("scbench_many_shot", ("(B)",), " (A)\n\nObject (B)", 0),
    ("scbench_many_shot", ("(B)",), "B (", 0),
    ("scbench_many_shot", ("valid",), "Valid", 1),
    ("scbench_choice_eng", ("Jo",), " C. Jo", 1),
    ("scbench_choice_eng", ("Jo",), "D", 0),
    ("scbench_choice_eng", ("Jo",), "Jo", 1),
    ("scbench_choice_eng", ("Jo",), 'the answer is: "C"', 1),
    ("scbench_choice_eng", ("Jo",), "the answer is: Mo", 0),
    ("scbench_choice_eng", ("Jo",), "it must be C, not A", 1),
    ("scbench_choice_eng", ("Jo",), "", 0),
    # Two of the three characters that are said, two of two that are right.
    ("scbench_qa_chn", ("小明",), "小 明。了", 2 * 2 / (3 + 2)),
    ("scbench_qa_chn", ("小明",), "。", 0),
    ("scbench_repoqa", (CODE,), f"Here:\n```python\n{CODE}\n```\nand ```more```", 1),
    ("scbench_repoqa", (CODE,), CODE.replace("f", "g"), 0),
    ("scbench_repoqa", (CODE,), "def g ( ) : pass", 0),
    # Longest common subsequences with the lines: a b c and a c d; a b c d of 4 and 7 words.
    ("scbench_summary", ("A b c, d",), "a b. c\nx a c d", 2 * 4 / (4 + 7)),
    ("scbench_summary", ("a b\nc d",), "c d\na b", 1),
    ("scbench_summary", ("a b",), "", 0),
    # The word counts as often as it is said.
    ("scbench_summary", ("a\na\na",), "a", 2 * 1 / (3 + 1)),
]


@pytest.mark.parametrize(("task", "answers", "prediction", "expected"), CASES)
def test_scores(task: str, answers: tuple[str, ...], prediction: str, expected: float) -> None:
    options = OPTIONS if task == "scbench_choice_eng" else ()
    turn = Turn("?", answers, options, task)
    assert score_turn(turn, prediction) == pytest.approx(expected)


def test_a_function_like_another_one() -> None:
    """A right answer has to be nearer to its own function than to every other."""
    long = " ".join(f"line{number}" for number in range(40))
    turn = Turn("?", (f"{long} a",), (), "scbench_repoqa", (f"{long} b",))
    assert score_turn(turn, f"{long} a") == 1
    assert score_turn(turn, f"{long} b") == 0
    assert score_turn(turn, long) == 0
    alone = Turn("?", (f"{long} a",), (), "scbench_repoqa")
    assert score_turn(alone, long) == 1


def test_bleu() -> None:
    """4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 runs of four; 5 words for 6."""
    value = bleu(["a", "b", "c", "d", "x"], ["a", "b", "c", "d", "e", "f"])
    precision = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert value == pytest.approx(precision * math.exp(1 - 6 / 5))
    assert bleu(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert bleu(["a", "b", "c", "d", "e"], ["a", "b", "c", "d"]) == pytest.approx(
        (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )
