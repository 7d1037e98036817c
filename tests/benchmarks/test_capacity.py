"""Random facts: runs are kept, both layers are treated alike, and bits mean what they say."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import capacity, capacity_report


def test_runs_are_kept_and_the_tables_have_every_row(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    assert capacity.main(arguments) == 0
    (path,) = tmp_path.glob("*/capacity_quick.json")
    runs = json.loads(path.read_text())["runs"]
    assert {run["row"] for run in runs.values()} == set(capacity.ROWS)
    for run in runs.values():
        assert 0 < run["bits"] <= 8 * run["facts"] and 0 < run["accuracy"] <= 1
        assert run["seconds"] > 0 and run["steps"] == 30
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {name} ") >= 3 for name in capacity.ROWS)
    assert "| product keys / SwiGLU" in printed

    changed = capacity.quick_runs()
    changed[0] = dataclasses.replace(changed[0], steps=2)
    monkeypatch.setattr(capacity, "quick_runs", lambda: changed)
    assert capacity.main(arguments) == 0  # trains only what has other settings now
    again = json.loads(path.read_text())["runs"]
    assert {key for key in runs if again[key] != runs[key]} == {changed[0].key}


def test_equal_multiply_adds():
    found = {
        name: capacity.FactModel(row.layer, row.sizes, row.residual).multiply_adds()
        for name, row in capacity.ROWS.items()
    }
    # Queries of two heads, 64 half keys in each half of each head, eight rows of each head.
    queries, scores, rows = 64 * 2 * 64, 2 * 2 * 64 * 32, 2 * 8 * 64
    assert found[capacity.MEMORY] == queries + scores + rows == 17408
    assert found[capacity.DENSE] == 3 * 64 * 91 == 17472


def test_the_dense_layer_has_every_chance():
    runs = capacity.all_runs()
    assert len({run.key for run in runs}) == len(runs)
    assert len({(run.steps, run.batch) for run in runs}) == 1
    dense, memory = (
        [run for run in runs if run.row == row] for row in (capacity.DENSE, capacity.MEMORY)
    )
    tried = {(run.facts, run.learning_rate, run.seed) for run in dense}
    rates = {run.learning_rate for run in dense}
    assert len(rates) >= 4
    assert all((run.facts, rate, run.seed) in tried for run in memory for rate in rates)


@pytest.mark.parametrize(("certain", "expected"), [(8, 64), (4, 32), (0, 0)])
def test_a_sure_and_right_answer_is_eight_bits(certain, expected):
    classes = torch.arange(8)
    logits = torch.zeros(8, 256)
    logits[range(certain), classes[:certain]] = 100.0
    assert math.isclose(capacity.stored_bits(logits, classes), expected, abs_tol=1e-9)


def test_wrong_answers_cost_bits_and_nothing_stored_is_zero():
    classes = torch.zeros(2, dtype=torch.int64)
    logits = torch.full((2, 4), -math.inf, dtype=torch.float64)
    logits[:, :2] = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).double().log()
    # Codes of log2(4 / 3) and 2 bits instead of 2 and 2.
    assert math.isclose(capacity.stored_bits(logits, classes), 2 - math.log2(4 / 3))
    logits[:, :2] = torch.tensor([[1.0, 15.0], [1.0, 15.0]]).double().log()
    assert capacity.stored_bits(logits, classes) == 0
    assert capacity.stored_bits(torch.full((2, 4), math.nan), classes) == 0


def test_every_pass_has_every_fact_once():
    drawn = torch.cat(list(capacity.batches(10, batch=4, steps=5, seed=0)))
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_best_over_rates_and_facts_seed_by_seed():
    def result(row, seed, bits, facts=1, seconds=1.0):
        sizes = {"multiply_adds": 2, "parameters": 4 if row == "a" else 40}
        return {"row": row, "seed": seed, "bits": bits, "facts": facts, "seconds": seconds, **sizes}

    results = [
        result("a", 0, 10.0),
        result("a", 0, 12.0, seconds=4.0),
        result("a", 0, 8.0, facts=2),
        result("a", 1, 20.0, facts=2),
        result("b", 0, 60.0),
        result("b", 1, 60.0),
    ]
    best = capacity_report.best_by_seed(results, "a")
    assert {seed: found["bits"] for seed, found in best.items()} == {0: 12, 1: 20}
    best = capacity_report.best_by_seed(results, "a", facts=2)
    assert {seed: found["bits"] for seed, found in best.items()} == {0: 8, 1: 20}
    assert capacity_report.ratios(results, "a", "b", "bits") == [5, 3]
    assert capacity_report.ratios(results, "a", "b", "bits per parameter") == [0.5, 0.3]
    assert capacity_report.ratios(results, "a", "b", "bits per second") == [6, 3]
    assert capacity_report.step_seconds([run | {"steps": 4} for run in results], "a") == 0.25


@pytest.mark.slow
def test_two_processes_train_the_same_models(tmp_path):
    runs = capacity.quick_runs()[:6]
    found = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.json"
        capacity.train_missing(runs, path, workers)
        kept = json.loads(path.read_text())["runs"]
        found.append({key: (run["bits"], run["accuracy"]) for key, run in kept.items()})
    assert found[0] == found[1] and len(found[0]) == 6
