"""Any causal language model of the Hub is evaluated by its id, beside a model of this library."""

import json
from pathlib import Path

from tests.hub.server import HubServer
from tests.hub.test_round_trip import run_with

PUSH = """
import memlm
from memlm.data import ByteTokenizer
from memlm.models import MemLMConfig, MemLMForCausalLM
from transformers import AutoModelForCausalLM, MistralConfig

base = MistralConfig(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512, sliding_window=None,
)
AutoModelForCausalLM.from_config(base).push_to_hub("someone/mistral")
ByteTokenizer().push_to_hub("someone/mistral")
layer = {"mixer": {"type": "sliding_attention", "window": 16}, "memory": "gated_delta"}
own = MemLMConfig(vocab_size=259, hidden_size=32, intermediate_size=48, layers=[layer])
MemLMForCausalLM(own).push_to_hub("someone/memory")
ByteTokenizer().push_to_hub("someone/memory")
"""

EVALUATE = """
import sys
from memlm.evaluation.main import main

words = "--model someone/memory,someone/mistral --tasks needle --lengths 200 --trials 4"
assert main([*words.split(), "--batch_size", "2", "--output", sys.argv[1]]) == 0
assert main(["--model", "someone/absent", "--output", sys.argv[1] + "2"]) == 2
print("done")
"""


def test_models_are_evaluated_by_their_ids(hub: HubServer, tmp_path: Path) -> None:
    run_with(hub, tmp_path / "pusher", PUSH)
    run_with(hub, tmp_path / "judge", EVALUATE, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["model"]["source"] for run in results["runs"]] == [
        "someone/memory",
        "someone/mistral",
    ]
    assert [run["model"]["name"] for run in results["runs"]] == ["memory", "mistral"]
    assert results["comparisons"][0]["paired"]
