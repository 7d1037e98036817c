import dataclasses
import json

import pytest
import torch

from benchmarks import pretrain
from benchmarks.pretrain import FLA, OURS, PRESETS, Case, main
from memlm.models import MemLMForCausalLM


@pytest.mark.slow  # the server that starts its processes has to import torch first
def test_a_case_that_fails_ends_no_other(tmp_path, monkeypatch, capsys):
    good = Case("tiny", OURS, "hybrid", 64, "cpu", 2)
    bad = dataclasses.replace(good, length=63)  # of which the preset says nothing
    peer = dataclasses.replace(good, side=FLA)
    monkeypatch.setattr(pretrain, "cases", lambda *_: [bad, peer, good])
    words = ["--device", "cpu", "--preset", "tiny", "--output", str(tmp_path)]
    assert main(words) == 1  # one of ours failed
    (path,) = tmp_path.rglob("pretrain_tiny_cpu.json")
    failed, refused, measured = json.loads(path.read_text())["cases"]
    assert failed["failed"] == "KeyError: 63"
    assert refused["failed"] == "flash-linear-attention needs a GPU"
    assert "failed" not in measured and measured["mfu"] is None
    assert measured["tokens_per_second"] > 0 and measured["peak_memory"] > 2**20
    assert len(measured["losses"]) == pretrain.WARM_UP + 2
    assert measured["losses"][0] == pytest.approx(torch.tensor(97.0).log().item(), rel=0.05)
    assert "| memlm hybrid |" in capsys.readouterr().out


def test_every_model_has_about_as_many_parameters():
    sizes = {}
    for name in ("hybrid", "gated_delta", "transformer"):
        with torch.device("meta"):
            model = MemLMForCausalLM(PRESETS["340m"].config(name))
        sizes[name] = sum(parameter.numel() for parameter in model.parameters()) / 340e6
    assert all(0.97 < size < 1.03 for size in sizes.values()), sizes


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(pretrain.importlib.util, "find_spec", lambda name: None)
    found = {case.name: pretrain.refusal(case) for case in pretrain.cases("340m", "cuda", 1)}
    missing = "flash-linear-attention is not installed"
    assert found == {
        "memlm hybrid": None,
        "fla hybrid": missing,
        "memlm gated_delta": None,
        "fla gated_delta": missing,
        "memlm transformer (sdpa)": None,
    }
    monkeypatch.setattr(pretrain.importlib.util, "find_spec", lambda name: name == "fla" or None)
    hybrid = Case("340m", FLA, "hybrid", 8192, "cuda", 1)
    assert "needs flash_attn" in pretrain.refusal(hybrid)
    assert pretrain.refusal(dataclasses.replace(hybrid, model="gated_delta")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "pretrain: torch finds no CUDA GPU\n"


@pytest.mark.slow
def test_all_cases_run_on_a_cpu(tmp_path):
    assert main(["--device", "cpu", "--preset", "tiny", "--output", str(tmp_path)]) == 0
