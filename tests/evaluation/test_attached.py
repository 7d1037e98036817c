"""Evaluation of a pretrained model with an attached memory."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedConfig

from memlm import attach_memory
from memlm.data import ByteTokenizer
from memlm.evaluation import evaluate
from memlm.evaluation.conditions import attention_reach, make_plan
from memlm.evaluation.config import EvaluationConfig, NeedleOptions, PerplexityOptions
from memlm.evaluation.main import main

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
SWITCHED = ["on", "off", "reset", "swapped"]
MEMORIES = {
    "knn_cache": {"type": "knn_cache", "capacity": 64, "segment": 8, "key_size": 8, "top_k": 4},
    "gated_delta": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
}


def base(config: PreTrainedConfig):
    torch.manual_seed(0)
    return Auto.from_config(config).eval()


def mistral() -> MistralForCausalLM:
    return base(MistralConfig(**SIZES, **HEADS, sliding_window=16))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a memory with open gates."""
    mistral().save_pretrained(tmp_path / "base")
    model = Auto.from_pretrained(tmp_path / "base")
    attach_memory(model, {"memory": {**MEMORIES["gated_delta"], "gate": 1.0}})
    model.save_pretrained(tmp_path / "run")
    ByteTokenizer().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_reach_is_that_of_the_models_attention():
    memory = {"memory": MEMORIES["gated_delta"]}
    model = attach_memory(mistral(), memory)
    assert attention_reach(model) == 3 * 15
    model.set_attention_window(8)
    assert attention_reach(model) == 3 * 7
    everything = attach_memory(base(LlamaConfig(**SIZES, **HEADS)), memory)
    assert attention_reach(everything) is None
    assert any("reaches the whole context" in note for note in make_plan(everything).notes)
    config = LlamaConfig(**SIZES, **HEADS)
    assert attention_reach(attach_memory(base(config), memory | {"window": 4})) == 3 * 3


@pytest.mark.parametrize("name", MEMORIES)
def test_conditions_touch_the_memory_only(name):
    plan = make_plan(attach_memory(mistral(), {"memory": MEMORIES[name], "layers": [0, 2]}))
    assert plan.conditions == ("on", "off", "reset", "swapped", "changed", "absent")
    assert plan.memory_names == ("0.memory", "2.memory") and not plan.notes


@pytest.mark.parametrize("name", MEMORIES)
def test_only_an_open_memory_is_worth_something(name, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().upper())
    files = [str(text_file), str(other)]
    model = attach_memory(mistral(), {"memory": MEMORIES[name], "layers": [0, 1, 2]})
    options = PerplexityOptions(length=192, documents=2, segment=48, files=files)
    config = EvaluationConfig(tasks=["perplexity"], perplexity=options)

    def losses() -> dict[str, float]:
        result = evaluate(model, ByteTokenizer(), config, progress=False)
        scores = result["runs"][0]["tasks"]["perplexity"]["scores"]["all"]
        return {condition: score["value"] for condition, score in scores.items()}

    new = losses()
    assert new["on"] == new["off"] == new["reset"] == new["swapped"]
    for branch in model.memory.layers.values():
        branch.gate.data.fill_(1.0)
    opened = losses()
    assert opened["off"] == new["off"]
    assert len({opened["on"], opened["off"], opened["reset"], opened["swapped"]}) == 4


def test_needles_lie_out_of_reach(text_file):
    model = attach_memory(mistral(), {"memory": MEMORIES["knn_cache"]})
    config = EvaluationConfig(
        tasks=["needle"],
        lengths=[160],
        trials=4,
        needle=NeedleOptions(depths=2),
        haystack=[str(text_file)],
    )
    results = evaluate(model, ByteTokenizer(), config, progress=False)
    result = results["runs"][0]["tasks"]["needle"]
    assert result["least_distance_tokens"] == 3 * 15
    assert set(result["scores"]["160"]) == {*SWITCHED, "changed", "absent"}


@pytest.mark.usefixtures("no_pictures")
def test_the_command_line(folder, text_file, tmp_path, capsys):
    words = ["--model", str(folder), "--output", str(tmp_path / "out"), "--tasks", "needle"]
    words += ["--lengths", "160", "--trials", "4", "--needle.depths", "2"]
    words += ["--haystack", str(text_file), "--conditions", ",".join(SWITCHED)]
    assert main(words) == 0
    assert "swapped" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["runs"][0]["conditions"] == SWITCHED
    assert results["runs"][0]["model"]["attention_reach_tokens"] == 3 * 15


@pytest.mark.parametrize("damage", ["gone", "another", "weights"])
def test_a_memory_that_does_not_fit(folder, damage, tmp_path, capsys):
    messages = {
        "gone": "that this memory belongs to cannot be loaded",
        "another": "are not those that this memory was trained on",
        "weights": "memory.safetensors is damaged",
    }
    if damage == "gone":
        (tmp_path / "base").rename(tmp_path / "elsewhere")
    elif damage == "another":
        changed = mistral()
        changed.model.norm.weight.data += 1
        changed.save_pretrained(tmp_path / "base")
    else:
        content = bytearray((folder / "memory.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "memory.safetensors").write_bytes(content)
    words = ["--model", str(folder), "--output", str(tmp_path / "out"), "--tasks", "needle"]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: model: ") and messages[damage] in error


def test_a_folder_with_neither(tmp_path, capsys):
    words = ["--model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is no model folder" in capsys.readouterr().err
