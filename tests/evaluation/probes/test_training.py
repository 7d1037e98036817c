"""The probes of a model before and after it is trained on bigrams."""

import pytest
import torch
import yaml

from memlm.config import load_config
from memlm.evaluation.loading import load_model
from memlm.evaluation.probes.associative import probe_associations
from memlm.training.trainer import Trainer


@pytest.mark.slow
def test_the_probes_rise_as_an_induction_head_is_trained(tmp_path) -> None:
    """About a minute on one core of its own."""
    sections = {
        "model": {
            "hidden_size": 64,
            "tie_word_embeddings": False,
            "layers": [{"repeat": 2, "mixer": {"type": "attention", "num_heads": 1}}],
        },
        "data": {
            "tokenizer": "integers:32",
            "sources": [{"type": "bigrams", "tokens": 32, "triggers": 5}],
        },
        "train": {
            "steps": 800,
            "length": 64,
            "tokens_per_step": 2048,
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "warmup_steps": 20,
            "evaluation_rows": 32,
            "save_every": 0,
            "output_dir": str(tmp_path / "run"),
        },
    }
    path = tmp_path / "bigrams.yaml"
    path.write_text(yaml.safe_dump(sections))
    config = load_config(path)
    task = config.data.parsed_sources()[0].generator
    trainer = Trainer(config)
    before = probe_associations(trainer.model.eval(), task, length=64).heads[1]
    assert max(before.induction, before.output_value, *before.key_query) < 0.3
    trainer.model.train()
    trainer.run()
    found = probe_associations(load_model(config.train.output_dir, torch.float32), task, length=64)
    second = found.heads[1]
    assert second.key_query[0] > 0.9
    assert second.induction > 0.8
    assert second.output_value > 0.75
    assert found.measures["in_context_accuracy"] > 0.95
    assert found.bigram_kl_bits < 0.1 * found.uniform_kl_bits
