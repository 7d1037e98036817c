"""Any causal language model of the Hub is evaluated by its id, beside a model of this library."""

import json
from pathlib import Path

import pytest
from transformers import MistralConfig, MistralForCausalLM

from memlm.data import ByteTokenizer
from memlm.evaluation.main import main
from memlm.models import MemLMConfig, MemLMForCausalLM
from tests.hub.conftest import Client

MISTRAL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "sliding_window": None,
}


@pytest.mark.usefixtures("no_pictures")
def test_models_are_evaluated_by_their_ids(client: Client, tmp_path: Path, capsys) -> None:
    MistralForCausalLM(MistralConfig(**MISTRAL)).push_to_hub("someone/mistral")
    ByteTokenizer().push_to_hub("someone/mistral")
    layer = {"mixer": {"type": "sliding_attention", "window": 16}, "memory": "gated_delta"}
    own = MemLMConfig(vocab_size=259, hidden_size=32, intermediate_size=48, layers=[layer])
    MemLMForCausalLM(own).push_to_hub("someone/memory")
    ByteTokenizer().push_to_hub("someone/memory")

    words = "--model someone/memory,someone/mistral --tasks needle --lengths 200 --trials 4"
    output = tmp_path / "out"
    assert main([*words.split(), "--batch_size", "2", "--output", str(output)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert [run["model"]["source"] for run in results["runs"]] == [
        "someone/memory",
        "someone/mistral",
    ]
    assert [run["model"]["name"] for run in results["runs"]] == ["memory", "mistral"]
    assert results["comparisons"][0]["paired"]
    assert main(["--model", "someone/absent", "--output", str(tmp_path / "other")]) == 2
    assert "no such model was found on the Hub" in capsys.readouterr().err
