import copy
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from memlm.config import TrainConfig
from memlm.training import Trainer
from memlm.training.logs import LN2, METRICS_FILE, read_metrics
from memlm.training.report import Report

MEMORY = {
    "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
    "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
    "ffn": "swiglu",
}


def records(config):
    found = read_metrics(config.output_dir / METRICS_FILE)
    return [record for record in found if not record.get("evaluation")]


@pytest.fixture
def sources(corpus, tmp_path):
    """Two texts and a recall task, whose losses differ."""
    other = tmp_path / "other.txt"
    other.write_text("zebra " * 2000)
    passkey = {"type": "passkey", "files": [str(other)], "digits": [1, 2], "queries": [1, 1]}
    return [
        {"type": "text", "files": [str(corpus)], "weight": 2},
        {"type": "text", "files": [str(other)]},
        {**passkey, "weight": 0.5},
    ]


def expected_bits(trainer, batch):
    """Mean losses of a batch by source and group, from one call per row."""
    model = copy.deepcopy(trainer.model).eval()
    losses = {}
    for row in range(len(batch["labels"])):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        names = ("input_ids", "segment_ids", "position_ids")
        logits = model(**{name: one[name] for name in names}, use_cache=False).logits[0]
        found = F.cross_entropy(logits, one["labels"][0], reduction="none", ignore_index=-100)
        for place, loss in enumerate(found.tolist()):
            if one["labels"][0, place] != -100:
                source = trainer.dataset.source_names[one["sources"][0, place]]
                group = ("text", "answer")[one["loss_groups"][0, place]]
                for key in (f"source/{source}/bits", f"{group}_bits", "bits"):
                    losses.setdefault(key, []).append(loss / LN2)
    return {key: sum(values) / len(values) for key, values in losses.items()}


@pytest.mark.parametrize("how", ["rows", "replay"])
def test_loss_by_source_is_exact(make_config, sources, how):
    options = {"backprop": "replay", "replay_segment": 24} if how == "replay" else {}
    config = make_config(
        model={"layers": [MEMORY]},
        data={"sources": sources},
        steps=1,
        tokens_per_step=64 * 14,
        micro_batch_rows=3,
        loss_weights={"text": 1.0, "answer": 0.5},
        **options,
    )
    trainer = Trainer(config)
    batch = trainer.feed.get(0)
    assert batch["sources"].unique().tolist() == [0, 1, 2]
    expected = expected_bits(trainer, batch)
    trainer.run()
    (record,) = records(config)
    names = {f"source/{name}/bits" for name in ("text", "text.2", "passkey")}
    assert names == {key for key in record if key.startswith("source/")} and names < set(expected)
    for key, value in expected.items():
        assert record[key] == pytest.approx(value, rel=1e-4), key
    weighted = LN2 * (expected["text_bits"] + 0.5 * expected["answer_bits"])
    assert record["loss"] == pytest.approx(weighted, rel=1e-4)


def test_only_steps_that_are_told_of_wait_for_the_device(monkeypatch):
    waited = []
    module = SimpleNamespace(synchronize=waited.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    report = Report.__new__(Report)
    report.options = TrainConfig(steps=9, log_every=4)
    report.accelerator = SimpleNamespace(device=torch.device("cuda"))
    counts = []
    for step in range(1, 10):
        report.settle(step, made=step != 6)
        counts.append(len(waited))
    assert counts == [1, 1, 1, 2, 2, 3, 3, 4, 5]


def test_the_wait_for_the_device_is_time_of_the_step(make_config, monkeypatch):
    monkeypatch.setattr(Report, "settle", lambda *_: time.sleep(0.1))
    config = make_config(steps=2, log_every=1)
    assert Trainer(config).run().seconds > 0.2
    for record in records(config):
        assert record["step_seconds"] > 0.1


def test_one_source_is_not_told_apart(make_config):
    config = make_config(steps=1)
    trainer = Trainer(config)
    assert "sources" not in trainer.feed.get(0)
    trainer.run()
    assert not [key for key in records(config)[0] if key.startswith("source")]
