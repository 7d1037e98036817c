"""Needles by Titans' memories at a tiny size: runs are kept, the state's size is measured."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import titans_needles
from memlm.config import load_config
from memlm.yaml_tree import read_yaml

CONFIG = Path(__file__).parents[2] / "configs" / "titans_needle.yaml"


def tiny_config(folder: Path) -> Path:
    config = read_yaml(CONFIG)
    files = [str(folder / f"{letter}.txt") for letter in "abcdefgh"]  # some of them held out
    for file in files:
        Path(file).write_text("".join(f"line {number} of {file}\n" for number in range(50)))
    config["model"]["hidden_size"] = 32
    config["model"]["layers"][0] |= {"repeat": 1}
    config["model"]["layers"][0]["mixer"]["window"] = 32
    config["data"] |= {"validation_fraction": 0.5}
    config["data"]["sources"][0]["files"] = files
    config["train"] |= {"steps": 2, "tokens_per_step": 256, "evaluation_rows": 2}
    config["train"]["curriculum"] = [{"length": 128, "window": 16}]
    config["evaluate"] |= {"lengths": [128], "trials": 4, "haystack": files}
    config["evaluate"]["needle"] = {"depths": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_runs_are_kept_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(titans_needles, "STREAM_TOKENS", 1024)
    monkeypatch.setattr(titans_needles, "STREAM_PART", 512)
    arguments = ["--variants", "lmm", "--seeds", "3", "--config", str(tiny_config(tmp_path))]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    assert titans_needles.main(arguments) == 0
    (path,) = tmp_path.glob("results/*/titans_needles.json")
    runs = json.loads(path.read_text())["runs"]
    (run,) = runs.values()
    assert (run["variant"], run["seed"], run["config"]["data"]["seed"]) == ("lmm", 3, 3)
    assert set(run["needle"]["128"]) == {"on", "off", "reset", "swapped"}
    stream = run["stream"]
    assert stream["tokens"] == [512, 1024] and min(stream["seconds"]) > 0
    assert stream["state_bytes"][0] == stream["state_bytes"][1]
    assert stream["state_bytes"][1] > stream["memory_state_bytes"][1] > 0
    printed = capsys.readouterr().out
    assert "128: on / off / reset / swapped" in printed and "| lmm " in printed

    assert titans_needles.main(arguments) == 0
    assert json.loads(path.read_text())["runs"] == runs  # nothing is trained twice
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["lmm-3"]


def test_every_variant_is_a_preset():
    kinds = {}
    for variant in titans_needles.VARIANTS:
        config = load_config(CONFIG, preset=None if variant == "lmm" else variant)
        (layer,) = config.model["layers"]
        memory = layer.get("memory") or layer["mixer"]
        kinds[variant] = memory.get("variant", memory["type"])
        assert config.train.curriculum[-1].length == 2048
    assert kinds == {"lmm": "lmm", "mac": "mac", "mag": "mag", "window": "sliding_attention"}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_newton_schulz_orthogonalises(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = gradient.clone()
    found = titans_needles.newton_schulz(gradient, (3.4445, -4.775, 2.0315), 5, 1e-7)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    torch.testing.assert_close(u.T @ found @ vt.T, torch.diag(torch.diag(u.T @ found @ vt.T)))
    assert torch.equal(gradient, before)


def test_muon_takes_it_for_the_time_of_the_benchmark():
    def step(context) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(16, 24))
        weight.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
        with context:
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
        return weight.detach()

    own, torchs = step(titans_needles.float32_muon()), step(contextlib.nullcontext())
    assert not torch.equal(own, torchs)
    torch.testing.assert_close(own, torchs, atol=0.05, rtol=0.05)  # bfloat16
    assert torch.equal(step(contextlib.nullcontext()), torchs)
