"""Needles by attached memories at a tiny size: the base is kept, runs are kept, tables are told."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks import attach
from memlm.config import load_config
from memlm.data import ByteTokenizer
from memlm.training.setup import build_model
from memlm.yaml_tree import read_yaml

CONFIG = Path(__file__).parents[2] / "configs" / "attach.yaml"
TINY = attach.Base(
    hidden_size=32, layers=3, heads=2, window=48, stages=((2, 64), (1, 128)), tokens_per_step=256
)


def tiny_config(folder: Path, steps: int = 2) -> Path:
    config = read_yaml(CONFIG)
    files = [str(folder / f"{letter}.txt") for letter in "abcdefgh"]  # some of them held out
    for file in files:
        Path(file).write_text("".join(f"line {number} of {file}\n" for number in range(50)))
    tiny = config["presets"]["tiny"]
    tiny["data"] |= {"validation_fraction": 0.5}
    tiny["data"]["sources"][0]["files"] = files
    tiny["train"] |= {"steps": steps, "tokens_per_step": 256, "evaluation_rows": 2}
    tiny["train"]["curriculum"] = [{"length": 128, "window": 32}]
    tiny["evaluate"] |= {"lengths": [256], "trials": 4, "haystack": files}
    tiny["evaluate"]["needle"] = {"depths": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_runs_are_kept_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attach, "BASE", TINY)
    names = ["knn_cache", "knn_cache + LoRA"]
    arguments = ["--variants", *names, "--config", str(tiny_config(tmp_path))]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    assert attach.main(arguments) == 0
    (path,) = tmp_path.glob("results/*/attach.json")
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"base", *names}
    assert set(runs["base"]["in_reach"]) == {"128"} and set(runs["base"]["needle"]) == {"256"}
    for name in names:
        assert set(runs[name]["needle"]["256"]) == {"on", "off", "reset", "swapped"}
        assert runs[name]["least_distance_tokens"] == 3 * 31  # of the last stage
    assert runs[names[1]]["saved_bytes"] > runs[names[0]]["saved_bytes"] > 0
    assert runs[names[0]]["bits_per_byte"]["before"] == runs[names[1]]["bits_per_byte"]["before"]
    printed = capsys.readouterr().out
    assert "256: on / off / reset / swapped" in printed and "| knn_cache + LoRA " in printed

    weights = tmp_path / "runs" / "base" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert attach.main(arguments) == 0
    assert json.loads(path.read_text())["runs"] == runs  # nothing is trained twice
    assert weights.stat().st_mtime_ns == before

    tiny_config(tmp_path, steps=3)
    assert attach.main(arguments) == 0
    again = json.loads(path.read_text())["runs"]
    assert [name for name in runs if again[name] != runs[name]] == names


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model, pretrained once."""
    folder = tmp_path_factory.mktemp("attach") / "base"
    attach.pretrain(TINY, folder)
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_another_base_is_trained_anew(tmp_path, monkeypatch):
    config, folder, path = tiny_config(tmp_path), tmp_path / "base", tmp_path / "attach.json"
    attach.pretrain(TINY, folder)
    first = (folder / "model.safetensors").read_bytes()
    other = attach.dataclasses.replace(TINY, seed=1)
    attach.pretrain(other, folder)
    assert (folder / "model.safetensors").read_bytes() != first
    attach.judge_base(attach.variant_config("knn_cache", config, folder), other, folder, path)
    assert json.loads(path.read_text())["runs"]["base"]["settings"]["seed"] == 1


def test_pretraining_weighs_text_and_answers_alike(base):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    groups = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    batch = {name: torch.randint(0, 256, (2, 4)) for name in ("input_ids", "labels")}
    loss = attach.pretraining_loss(model, batch | {"loss_groups": groups})
    losses = F.cross_entropy(model(batch["input_ids"]).logits.mT, batch["labels"], reduction="none")
    torch.testing.assert_close(loss, losses[groups == 0].mean() + losses[0, 3])


@pytest.mark.parametrize("name", attach.VARIANTS)
def test_every_variant_fits_the_base(name, base):
    config = attach.variant_config(name, CONFIG, base)
    assert config.train.curriculum[-1].length == 1024
    model = build_model(config, ByteTokenizer(), None)
    assert {memory.name for memory in model.memories().values()} == {name.split(" ")[0]}
    assert ("lora" in name.lower()) == any("lora_" in key for key in model.state_dict())


def test_the_config_without_its_preset_is_complete():
    config = load_config(CONFIG)
    assert config.data.tokenizer == config.model["pretrained"] == "Qwen/Qwen3-0.6B"
    assert config.model["attach"]["lora"]["target_modules"] == ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
def test_needles_out_of_reach_are_found_after_a_short_training(tmp_path, monkeypatch):
    monkeypatch.setattr(attach, "BASE", attach.Base(stages=((280, 128),)))
    config = read_yaml(CONFIG)
    config["presets"]["tiny"]["evaluate"] |= {"lengths": [1024], "needle": {"depths": 5}}
    path = tmp_path / "medium.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["--variants", "knn_cache", "--config", str(path)]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    assert attach.main(arguments) == 0
    (path,) = tmp_path.glob("*/attach.json")
    runs = json.loads(path.read_text())["runs"]
    assert runs["base"]["needle"]["1024"]["high"] < 0.15
    found = runs["knn_cache"]
    assert found["needle_intervals"]["1024"]["on"][0] > 0.3
    for condition in ("off", "reset", "swapped"):
        assert found["needle_intervals"]["1024"][condition][1] < 0.15
