"""The comparison with faiss: its data, what counts as agreement, and what the command tells."""

import functools
import json

import pytest
import torch

from benchmarks import library
from benchmarks.retrieval import __main__ as command
from benchmarks.retrieval import cpu, measure
from benchmarks.retrieval.measure import NAMES, OURS, PEER
from benchmarks.retrieval.problem import Problem
from memlm.cuda.topk_search import native

needs_native = pytest.mark.native(native.SOURCE)
SMALL = Problem(1500, 16, 30, 8)


@pytest.fixture
def vectors_once(monkeypatch):
    """The vectors of a problem, which take longer to make than to search, are made once."""
    monkeypatch.setattr(Problem, "vectors", functools.cache(Problem.vectors))


def test_vectors_are_always_the_same_unit_vectors():
    queries, keys = SMALL.vectors()
    assert queries.shape == (30, 16) and keys.shape == (1500, 16)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(1500))
    assert torch.equal(keys, SMALL.vectors()[1])
    assert not torch.equal(keys, SMALL.vectors(seed=1)[1])
    # Neighbours share a context, and many tokens are the same.
    near = (keys[1:] * keys[:-1]).sum(-1).mean()
    far = (keys[700:] * keys[:-700]).sum(-1).mean()
    assert near > far + 0.2


@needs_native
@pytest.mark.parametrize("name", OURS)
def test_results_are_those_of_faiss(name):
    queries, keys = SMALL.vectors()
    expected = measure.search_of(SMALL, PEER, queries, keys)()
    found = measure.search_of(SMALL, name, queries, keys)()
    if OURS[name].dtype == torch.float32:
        assert measure.agreement(queries, keys, found, expected).within_rounding
    assert measure.recall(found, expected) > 0.95


def test_other_results_are_no_agreement():
    queries, keys = SMALL.vectors()
    expected = measure.search_of(SMALL, PEER, queries, keys)()
    same = measure.agreement(queries, keys, expected, expected)
    assert same.within_rounding and (same.indices, same.lists, same.largest) == (1, 1, 0)
    wrong = expected.clone()
    wrong[3, 5] = next(i for i in range(1500) if i not in expected[3])
    found = measure.agreement(queries, keys, wrong, expected)
    assert not found.within_rounding
    assert found.indices == pytest.approx(1 - 1 / 240) and found.lists == pytest.approx(29 / 30)
    assert measure.recall(wrong, expected) == pytest.approx(1 - 1 / 240)
    twice = expected.clone()
    twice[0, 1] = twice[0, 0]
    assert not measure.agreement(queries, keys, twice, expected).within_rounding
    # Keys with equal scores may change places.
    keys[expected[0, 1]] = keys[expected[0, 0]]
    swapped = expected.clone()
    swapped[0, :2] = expected[0, :2].flip(0)
    assert measure.agreement(queries, keys, swapped, expected).within_rounding


def test_threads_are_set_back():
    before = measure.faiss.omp_get_max_threads()
    measure.faiss.omp_set_num_threads(3)
    with measure.one_thread():
        assert torch.get_num_threads() == measure.faiss.omp_get_max_threads() == 1
    assert measure.faiss.omp_get_max_threads() == 3
    measure.faiss.omp_set_num_threads(before)


@needs_native
@pytest.mark.usefixtures("vectors_once")
def test_quick_run(tmp_path, capsys, monkeypatch):
    # Memory without processes of their own, which take seconds to start.
    monkeypatch.setattr(measure, "peak_memory", measure.peak_growth)
    monkeypatch.setattr(library.gc, "collect", lambda: 0)  # of all that pytest holds
    arguments = ["--device", "cpu", "--quick", "--repeats", "2", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/retrieval_cpu_quick.json")
    found = json.loads(path.read_text())
    assert found["machine"]["faiss-cpu"]
    rows = found["exact"]
    assert [row["name"] for row in rows] == list(NAMES)
    for row in rows[1:]:
        assert row["faster"]["median"] > 0 and len(row["seconds"]["wall"]) == 2
    assert rows[1]["agreement"]["largest"] <= measure.ROUNDING
    assert [row["name"] for row in found["engines"]] == list(cpu.ENGINES)
    for row in found["engines"]:
        assert row["recall"] > 0.9 and row["rows_per_second"] > 0 and row["build_seconds"] > 0
    printed = capsys.readouterr().out
    assert "All find the same" in printed and str(path) in printed


@needs_native
@pytest.mark.usefixtures("vectors_once")
def test_results_that_differ_end_with_1(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda problem, name: 0)
    monkeypatch.setattr(measure, "ROUNDING", -1.0)
    arguments = ["--device", "cpu", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    assert command.main(arguments) == 1


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--device", "cuda"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err
