"""Every memory's run config at its tiny size, from the first step to the judged checkpoint."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm.config import load_config
from memlm.evaluation import evaluate
from memlm.evaluation.config import EvaluationConfig, PerplexityOptions
from memlm.training import Trainer
from memlm.training.logs import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
# What is taken from the memory: its branch, or the values of one without a state.
ABLATION = {
    "gated_delta": "off",
    "lact": "off",
    "linear_attention": "off",
    "min_gru": "off",
    "min_lstm": "off",
    "retention": "off",
    "titans": "off",
    "titans_mac": "off",
    "titans_mag": "off",
    "titans_mal": "off",
    "product_key": "zeroed",
    "knn_cache": "off",
    "memorizing_attention": "off",
    "neural_cache": "off",
    "hybrid": "off",
}


def losses(folder: Path) -> dict[int, float]:
    records = read_metrics(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATION)
def test_tiny_preset_learns_resumes_generates_and_needs_its_memory(
    name: str, tmp_path: Path
) -> None:
    def config(folder: str):
        overrides = [f"--train.output_dir={tmp_path / folder}", "--train.log_every=1"]
        return load_config(CONFIGS / f"{name}.yaml", overrides, "tiny")

    summary = Trainer(config("whole")).run()
    whole = losses(summary.output_dir)
    assert len(whole) == 200
    first, last = (sum(list(whole.values())[part]) / 20 for part in (slice(20), slice(-20, None)))
    assert last < 0.7 * first
    assert summary.after["bits_per_byte"] < 0.75 * summary.before["bits_per_byte"]

    middle = summary.output_dir / "checkpoints" / "step_000100"
    (tmp_path / "resumed").mkdir()
    resumed = config("resumed")
    resumed.train.save_every = 0
    trainer = Trainer(resumed, resume=middle)
    trainer.run()
    again = losses(resumed.output_dir)
    assert again[101] == whole[101]
    # Not bit for bit: some kernels round by where their tensors happen to lie in memory.
    assert again == pytest.approx({step: whole[step] for step in range(101, 201)}, rel=1e-5)

    model = AutoModelForCausalLM.from_pretrained(summary.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(summary.output_dir)
    prompt = tokenizer("def read(self, size):\n    ", return_tensors="pt")
    greedy = {"max_new_tokens": 40, "do_sample": False}
    cached = model.generate(**prompt, **greedy, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **greedy, use_cache=False))

    options = PerplexityOptions(length=512, documents=32)
    judged = evaluate(
        model, tokenizer, EvaluationConfig(tasks=["perplexity"], perplexity=options), progress=False
    )
    worse = judged["runs"][0]["tasks"]["perplexity"]["memory_gain"]["all"][ABLATION[name]]
    print(f"\n{name}: loss {whole[1]:.3f} -> {whole[200]:.3f}, without the memory {worse}")
    assert 0 < worse["low"] <= worse["value"] < math.inf
