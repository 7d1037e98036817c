"""The comparison of losses: like with like, and what the command tells."""

import json

import pytest
import torch

from benchmarks import library, loss
from benchmarks.loss import COMPILED, OURS, PLAIN, Problem
from memlm.cuda.linear_cross_entropy import eager

SMALL, LARGE = Problem(64, 16, 8), Problem(2**15)


def rows(times, percent=4.0, problem=LARGE):
    """As `measure` gives them, with these seconds by name."""
    peak = int(problem.gradient_bytes + percent / 100 * problem.logits_bytes)
    one = {"problem": problem, "peak_bytes": peak}
    return [one | {"name": name, "seconds": seconds} for name, seconds in times.items()]


@pytest.mark.parametrize(
    ("device", "seconds", "percent", "verdict"),
    [
        ("cpu", 1.2, 4.9, "met"),
        ("cpu", 1.4, 4.9, "MISSED"),
        ("cpu", 1.2, 5.1, "MISSED"),
        ("cuda", 0.4, 0.9, "met"),
        ("cuda", 0.6, 0.9, "MISSED"),  # longer than the compiled one
        ("cuda", 0.4, 1.1, "MISSED"),
    ],
)
def test_the_verdict(device, seconds, percent, verdict):
    found = rows({PLAIN: [1.0] * 3, COMPILED: [0.5] * 3, OURS: [seconds] * 3}, percent)
    loss.judge(found, device)
    assert found[2]["verdict"] == verdict and found[2]["percent"] == pytest.approx(percent)
    assert found[2]["as_long"].median == pytest.approx(seconds)


def test_nothing_is_judged_where_something_failed_or_is_small():
    times = {PLAIN: [1.0], COMPILED: "RuntimeError: no compiler", OURS: [0.5]}
    found = rows(times)
    loss.judge(found, "cuda")
    assert found[2]["verdict"] == "not judged" and "percent" not in found[1]
    loss.judge(found, "cpu")
    assert found[2]["verdict"] == "met"
    found = rows(times, problem=SMALL)
    loss.judge(found, "cpu")
    assert found[2]["verdict"] == "not judged"


def test_peaks_within_custom_ops_are_seen():
    hidden, weight, targets = Problem(2048, 512, 8).inputs("cpu")

    def with_logits(_):
        loss.linear_cross_entropy(hidden, weight, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_KERNELS", "eager")
        patch.setattr(eager, "NUMBERS", 1 << 20)
        assert library.peak_allocated(with_logits) > 4 * 2048 * 512
    taken = library.peak_allocated(lambda _: (torch.empty(1000), torch.empty(500)))
    assert taken == 6000
    one_after_another = library.peak_allocated(lambda _: [len(torch.empty(n)) for n in (7, 10, 9)])
    assert one_after_another == 40


def test_quick_run(tmp_path, capsys, monkeypatch):
    # Compilation takes most of a minute; what is compiled is the first one.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    assert loss.main(arguments) == 0
    (path,) = tmp_path.glob("*/loss_quick.json")
    found = json.loads(path.read_text())
    assert found["machine"]["threads"] == 1 and found["repeats"] == 2
    assert [row["name"] for row in found["rows"]] == list(loss.contestants())
    for row in found["rows"]:
        assert row["as_long"]["median"] > 0 and len(row["seconds"]) == 2
        assert row["peak_bytes"] > Problem(2048, 512, 32).gradient_bytes
    printed = capsys.readouterr().out
    assert "All agree" in printed and str(path) in printed


def test_another_function_is_no_agreement(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    good = loss.contestants()
    changed = {PLAIN: good[PLAIN], OURS: lambda *given: 1.001 * good[OURS](*given)}
    monkeypatch.setattr(loss, "contestants", lambda: changed)
    found = loss.measure(SMALL, "cpu", 1)
    assert not loss.agree(found)
    assert loss.agree(found[:1]) and found[0]["differences"]["loss"] == 0
    found[1]["differences"] = {"loss": float("nan")}
    assert not loss.agree(found)
