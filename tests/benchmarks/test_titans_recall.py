"""Associative recall by neural memories: runs are kept, and accuracy means what it says."""

import dataclasses
import json
import types

import pytest
import torch

from benchmarks import titans_recall
from memlm.data.mqar import MqarRows


def test_runs_are_kept_and_the_table_has_every_row(tmp_path, monkeypatch, capsys):
    rows = {
        name: dataclasses.replace(settings, steps=3, batch=4, evaluate_every=2)
        for name, settings in titans_recall.ROWS.items()
    }
    monkeypatch.setattr(titans_recall, "ROWS", rows)
    monkeypatch.setattr(titans_recall, "EVALUATION_ROWS", 4)
    arguments = ["--quick", "--output", str(tmp_path)]
    assert titans_recall.main(arguments) == 0
    (path,) = tmp_path.glob("*/titans_recall.json")
    runs = json.loads(path.read_text())["runs"]
    assert {run["row"] for run in runs.values()} == set(rows)
    for run in runs.values():
        assert [step for step, _ in run["curve"]] == [2, 3] and run["steps"] == 3
        assert 0 <= run["accuracy"] <= 1 and run["error"] is None
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in rows)

    first = next(iter(rows))
    rows[first] = dataclasses.replace(rows[first], steps=1)
    assert titans_recall.main(arguments) == 0  # trains only what has other settings now
    again = json.loads(path.read_text())["runs"]
    changed = {key for key in runs if again[key] != runs[key]}
    assert changed == {f"{first}, seed 0"}


@pytest.mark.parametrize(("wrong", "expected"), [(0, 1.0), (1, 0.75), (4, 0.0)])
def test_accuracy_counts_questions(wrong, expected):
    rows = MqarRows(16, 16, pairs=4, seed=0, random_filler=False).batch([0])
    answers = torch.from_numpy(rows["labels"]).clamp_min(0)
    answers[0, answers[0].nonzero()[:wrong]] = 0  # no value

    def model(input_ids, use_cache):
        return types.SimpleNamespace(logits=torch.nn.functional.one_hot(answers, 16).float())

    assert titans_recall.accuracy(model, rows) == expected


def test_steps_to_a_level():
    assert titans_recall.first_step([[50, 0.3], [100, 0.99], [150, 0.98]], 0.99) == 100
    assert titans_recall.first_step([[50, 0.3]], 0.99) is None
