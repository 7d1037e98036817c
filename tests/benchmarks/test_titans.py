"""The comparison with titans-pytorch: the same function, and what the command tells."""

import importlib.util
import json

import pytest
import torch

from benchmarks import library
from benchmarks.titans import __main__ as command
from benchmarks.titans import cpu, cuda, measure
from benchmarks.titans.problem import Problem

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("titans_pytorch") is None,
    reason="titans-pytorch is not installed (pip install 'memlm[bench]')",
)


@needs_peer
@pytest.mark.parametrize(("channels", "chunk", "T", "B"), [(16, 4, 32, 2), (16, 16, 32, 1)])
def test_the_function_is_that_of_titans_pytorch(channels, chunk, T, B):
    found = measure.differences(Problem(channels, chunk, T, B, torch.float64))
    assert found["largest output"] > 1
    assert all(found[name] < 1e-12 for name in measure.TOLERANCE), found


@needs_peer
def test_another_function_is_no_agreement(monkeypatch):
    problem = Problem(16, 4, 32)
    assert measure.agrees(measure.differences(problem))
    for name in ("memory_model_parameters.2", "to_decay_factor.0.bias", "store_norm.weight"):
        both = measure.memories(problem)
        with torch.no_grad():
            both[measure.OURS].get_parameter(name).mul_(1.01)
        monkeypatch.setattr(measure, "memories", lambda _, both=both: both)
        assert not measure.agrees(measure.differences(problem))
        monkeypatch.undo()
    assert not measure.agrees(dict.fromkeys(measure.TOLERANCE, float("nan")))


@needs_peer
@pytest.mark.parametrize("lengths", cpu.FEEDS, ids=cpu.feed_name)
def test_ours_is_exact_in_several_calls(lengths):
    problem = Problem(16, 16, 96, 2, torch.float64)
    memory, x = measure.memories(problem)[measure.OURS], problem.inputs().detach()
    with torch.no_grad():
        fed = measure.feed(memory, x, lengths)
        torch.testing.assert_close(fed, memory(x)[0], rtol=0, atol=1e-12)


@needs_peer
def test_quick_run(tmp_path, capsys, monkeypatch):
    # Memory without processes of their own, which take seconds to start.
    monkeypatch.setattr(measure, "peak_memory", measure._peak_growth)
    monkeypatch.setattr(library.gc, "collect", lambda: 0)  # of all that pytest holds
    arguments = ["--device", "cpu", "--quick", "--repeats", "2", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/titans_cpu_quick.json")
    found = json.loads(path.read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["titans-pytorch"]
    assert [row["T"] for row in found["training"]] == [64, 128, 256]
    for row in found["training"][:2]:
        assert row["faster"]["median"] > 0 and row["differences"]["output"] < 1e-5
        assert len(row["memlm"]["seconds"]) == len(row["titans-pytorch"]["seconds"]) == 2
    assert "titans-pytorch" not in found["training"][2]
    assert [row["T"] for row in found["forward"]] == [128] and found["decoding"][0]["calls"] == 8
    streamed = {str(row["lengths"]): row for row in found["streaming"]}
    assert all(row["memlm"] < 1e-12 for row in streamed.values())
    printed = capsys.readouterr().out
    assert "The functions agree" in printed and "[40, 56]" in printed and str(path) in printed


@pytest.mark.slow
@needs_peer
def test_peak_memory_in_a_process_of_its_own():
    problem = Problem(64, 8, 256)
    ours, peer = (measure.peak_memory(problem, name) for name in (measure.OURS, measure.PEER))
    gradients = 256 // 8 * 2 * 64 * 256 * 4  # of every chunk, which titans-pytorch forms
    assert peer > 4 * gradients and 0 < ours < peer


def test_resident_growth_is_what_a_call_holds_at_its_peak():
    size = 1 << 26
    found = library.resident_growth(lambda _: [torch.ones(size // 4), torch.ones(size // 4)])
    assert 1.9 * size < found < 2.5 * size
    assert library.resident_growth(lambda _: None) < size / 8


def test_without_the_peer_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--device", "cpu"]) == 2
    assert "titans-pytorch is not installed" in capsys.readouterr().err


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_table_for_gpus_on_the_cpu(capsys):
    found, agree = cuda.compare("cpu", 1, quick=True)
    ours = [row for row in found["rows"] if row["implementation"].startswith("memlm")]
    assert agree and len(ours) == 5 and all(row["tokens_per_second"] > 0 for row in ours)
