import pytest

from memlm.evaluation.comparison import compare_runs, independent_difference
from memlm.evaluation.statistics import bootstrap_mean, wilson
from memlm.evaluation.tasks.base import Record


def record(trial, score, condition="on", prompt="p", references=("7",), setting="1024"):
    answers = [{"prediction": "", "references": list(references), "score": score}]
    return Record(
        setting, trial, condition, score, answers if references else [], prompt=f"{prompt}{trial}"
    )


def run(name, kind="hits", task="needle", settings=("1024",)):
    return {
        "model": {"name": name},
        "tasks": {task: {"kind": kind, "scores": dict.fromkeys(settings)}},
    }


def compare(first, second, kind="hits"):
    return compare_runs([run("a", kind), run("b", kind)], [{"needle": first}, {"needle": second}])


def test_paired_models():
    scores = [(1, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 1)]
    (found,) = compare(
        [record(trial, float(a)) for trial, (a, _) in enumerate(scores)],
        [record(trial, float(b)) for trial, (_, b) in reversed(list(enumerate(scores)))],
    )
    expected = bootstrap_mean([a - b for a, b in scores])
    assert found == {
        "task": "needle", "setting": "1024", "first": "a", "second": "b", "paired": True,
        "difference": {
            "value": expected.value, "low": expected.low, "high": expected.high, "count": 6,
        },
        "first_only": 2, "second_only": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["hits", "shares"])
def test_equal_differences_keep_a_width(kind):
    (found,) = compare([record(t, 1.0) for t in range(5)], [record(t, 0.0) for t in range(5)], kind)
    assert found["difference"]["value"] == 1
    assert 0.2 < found["difference"]["low"] < 0.9


def test_other_conditions_and_other_trials_are_left_out():
    first = [record(0, 1.0), record(1, 1.0), record(2, 1.0), record(2, 0.0, "off")]
    second = [record(0, 0.0), record(2, 1.0, "changed"), record(3, 1.0)]
    second.append(record(1, 0.0, references=("8",)))
    (found,) = compare(first, second)
    assert found["difference"]["count"] == 1 and found["first_only"] == 1


def test_other_tokenizers_are_not_paired():
    (found,) = compare(
        [record(t, float(t < 8)) for t in range(10)],
        [record(t, float(t < 2), prompt="other") for t in range(10)],
    )
    assert not found["paired"] and found["first_only"] == 6
    expected = independent_difference(wilson(8, 10), wilson(2, 10))
    assert found["difference"]["low"] == expected.low
    (one_differs,) = compare(
        [record(0, 1.0), record(1, 1.0)], [record(0, 1.0), record(1, 0.0, prompt="other")]
    )
    assert not one_differs["paired"]


def test_prompts_without_fingerprints_are_not_paired():
    first, second = record(0, 1.0), record(0, 1.0)
    first.prompt = second.prompt = ""
    assert not compare([first], [second])[0]["paired"]


def test_newcombe_of_independent_proportions():
    # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10: 56/70 - 48/80.
    found = independent_difference(wilson(56, 70), wilson(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_losses_are_better_when_lower():
    first = [record(t, 2.0 + 0.1 * t, references=()) for t in range(3)]
    second = [record(t, 2.5, references=()) for t in range(3)]
    (found,) = compare(first, second, kind="losses")
    assert found["difference"]["value"] == pytest.approx(-0.4)
    assert found["difference"]["high"] < 0
    assert (found["first_only"], found["second_only"]) == (3, 0)
    (single,) = compare(first[:1], second[:1], kind="losses")
    assert single["difference"]["low"] is None and single["difference"]["high"] is None


def test_every_pair_of_models_in_order():
    runs = [run("a", settings=("4096", "1024")), run("b", settings=("1024",)), run("c", task="vt")]
    both = [record(0, 1.0, setting="4096"), record(0, 1.0)]
    found = compare_runs(runs, [{"needle": both}, {"needle": both}, {"vt": both}])
    assert [(one["first"], one["second"], one["setting"]) for one in found] == [
        ("a", "b", "4096"),
        ("a", "b", "1024"),
    ]
    assert compare_runs(runs[:1], [{"needle": both}]) == []
