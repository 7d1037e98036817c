"""The baseline is trained, saved, and judged beside a model with a memory by one command."""

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks import llama_baseline
from memlm.data import ByteTokenizer
from memlm.evaluation.main import main as evaluate
from memlm.models import MemLMConfig, MemLMForCausalLM


@pytest.mark.slow
def test_a_llama_and_a_memory_in_one_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_baseline, "STAGES", ((2, 128), (1, 256)))
    monkeypatch.setattr(llama_baseline, "TOKENS_PER_STEP", 256)
    arguments = ["--output", str(tmp_path / "llama")]
    assert llama_baseline.main(arguments) == 0
    assert "parameters" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(model) is LlamaForCausalLM and model.config.max_position_embeddings == 4096
    assert llama_baseline.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err

    layer = {"mixer": {"type": "sliding_attention", "window": 16}, "memory": "gated_delta"}
    config = MemLMConfig(vocab_size=259, hidden_size=32, intermediate_size=48, layers=[layer])
    MemLMForCausalLM(config).save_pretrained(tmp_path / "memory")
    ByteTokenizer().save_pretrained(tmp_path / "memory")
    words = f"--model {tmp_path / 'memory'},{tmp_path / 'llama'} --output {tmp_path / 'out'}"
    words += " --tasks needle,mqar --lengths 200 --trials 4 --mqar.length 32 --mqar.pairs 4"
    words += " --mqar.rows 4"
    assert evaluate(words.split()) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    memory, llama = results["runs"]
    assert [run["model"]["name"] for run in results["runs"]] == ["memory", "llama"]
    assert memory["conditions"][:4] == ["on", "off", "reset", "swapped"]
    assert llama["conditions"] == ["on", "changed", "absent"]
    assert {found["task"] for found in results["comparisons"]} == {"needle", "mqar"}
    assert all(found["paired"] for found in results["comparisons"])
    cost = llama["tasks"]["needle"]["cost"]["200"]
    # Keys and values of 4 layers of 128 numbers in float32, for every token but the answer's last.
    assert cost["key_value_bytes"] % (2 * 4 * 128 * 4) == 0
    assert 150 < cost["key_value_bytes"] / (2 * 4 * 128 * 4) < 200
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("memory") and page.count("llama")
