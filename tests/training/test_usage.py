from types import SimpleNamespace

import pytest
import torch

from memlm.memory import ProductKey, ProductKeyConfig, UsageStatistics
from memlm.memory.base import CallContext
from memlm.training import Trainer, trainer
from memlm.training.logs import METRICS_FILE, PLOT_FILE, read_metrics
from memlm.training.plot import plot_run
from memlm.training.usage import USAGE_PLOT_FILE, WINDOW, UsageLog, rank_curve

FFN = {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3}
LAYER = {"mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2}, "ffn": FFN}
SITE = "layers.0.ffn"


def usage_of(config):
    """The usage statistics in the records of a run's training steps."""
    records = read_metrics(config.output_dir / METRICS_FILE)
    return [
        {
            key: value
            for key, value in record.items()
            if key.startswith("layers.") and not key.endswith(".gate_mean")
        }
        for record in records
        if not record.get("evaluation")
    ]


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    """They are drawn after all."""
    monkeypatch.setattr(trainer, "plot_run", plot_run)


@pytest.mark.usefixtures("pictures")
def test_training_logs_and_draws_usage(make_config):
    config = make_config(model={"layers": [{**LAYER, "repeat": 2}]}, evaluation_rows=2)
    Trainer(config).run()
    logged = usage_of(config)
    names = ("used", "kl_to_uniform", "top1_mass", "reads_per_slot")
    assert len(logged) == 6
    for record in logged:
        assert set(record) == {f"layers.{i}.ffn.{name}" for i in (0, 1) for name in names}
        assert record[f"{SITE}.reads_per_slot"] == 256 * 2 * 3 / 36
        assert 0.5 < record[f"{SITE}.used"] <= 1 and record[f"{SITE}.top1_mass"] > 1 / 36
    final = read_metrics(config.output_dir / METRICS_FILE)[-1]
    assert final["evaluation"] and 0 < final[f"{SITE}.used"] <= 1 and f"{SITE}.gini" in final
    assert (config.output_dir / USAGE_PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert (config.output_dir / PLOT_FILE).stat().st_size > 10_000


@pytest.mark.usefixtures("pictures")
def test_without_product_keys_nothing_is_drawn(make_config):
    config = make_config(steps=1)
    Trainer(config).run()
    assert usage_of(config) == [{}] and not (config.output_dir / USAGE_PLOT_FILE).exists()


def test_recomputed_tokens_and_padding_do_not_count(make_config, monkeypatch):
    plain = make_config("plain", model={"layers": [LAYER]}, steps=2)
    saving = make_config(
        "saving",
        model={"layers": [LAYER]},
        steps=2,
        activations="recompute",
        micro_batch_rows=2,
    )
    for config in (plain, saving):
        Trainer(config).run()
    assert usage_of(saving) == usage_of(plain)

    run = Trainer(make_config("padded", model={"layers": [LAYER]}, steps=1))
    get = run.feed.get

    def padded(step):
        batch = get(step)
        batch["segment_ids"][0, :30] = 0
        return batch

    monkeypatch.setattr(run.feed, "get", padded)
    run.run()
    assert usage_of(run.config)[0][f"{SITE}.reads_per_slot"] == (256 - 30) * 2 * 3 / 36


def memory():
    torch.manual_seed(0)
    return ProductKey(ProductKeyConfig(num_keys=6, num_heads=2, top_k=3), hidden_size=16)


def read(log, module, tokens):
    with log.watch():
        module(torch.randn(1, tokens, 16), None, CallContext.plain(1, tokens))


@pytest.mark.parametrize("processes", [1, 2])
def test_windows_are_reported_when_slots_were_read_often_enough(processes):
    # Another process that reads exactly what this one does.
    accelerator = SimpleNamespace(
        num_processes=processes,
        device=torch.device("cpu"),
        reduce=lambda values, how: values * processes,
    )
    module = memory()
    log = UsageLog(module, accelerator)
    enough = WINDOW * 36 // (2 * 3 * processes)
    read(log, module, enough - 1)
    assert log.report() == {}
    read(log, module, 1)
    counts = log.recorders[""].counts.clone()
    report = log.report()
    assert report[".reads_per_slot"] == WINDOW
    assert report[".kl_to_uniform"] == pytest.approx(UsageStatistics.of(counts).kl_to_uniform)
    # The next window starts from nothing, and one that is cut off is left out.
    read(log, module, enough - 1)
    assert log.recorders[""].counts.sum() == 6 * (enough - 1)
    assert log.report(last=True) == {}
    module(torch.randn(1, 9, 16), None, CallContext.plain(1, 9))  # not watched
    assert log.recorders[""].reads == 6 * (enough - 1)


def test_a_run_shorter_than_a_window_reports_what_there_is():
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    module = memory()
    log = UsageLog(module, accelerator)
    assert log.report(last=True) == {}
    read(log, module, 6)
    assert log.report() == {}
    assert log.report(last=True)[".reads_per_slot"] == 1.0


def test_rank_curve_is_relative_to_the_mean():
    ranks, reads = rank_curve(torch.tensor([1, 6, 0, 1]))
    assert ranks == [1, 2, 3, 4] and reads == [3.0, 0.5, 0.5, 0.0]
    ranks, _ = rank_curve(torch.ones(100_000, dtype=torch.int64))
    assert len(ranks) < 200 and ranks[0] == 1 and ranks[-1] == 100_000


def test_reads_of_skipped_steps_do_not_count(make_config):
    config = make_config(model={"layers": [LAYER]}, steps=4, log_every=4, reinit_keys_after=8)
    run = Trainer(config)
    passes = run.guard.passes
    run.guard.passes = lambda *found: passes(*found) and run.step not in (0, 2)
    counted = []
    after_step = run.dead_keys.after_step

    def watched(step, last=False):
        counted.append(int(run.usage.recorders[SITE].half_keys.sum()))
        return after_step(step, last)

    run.dead_keys.after_step = watched
    run.run()
    reads = 256 * 2 * 3
    assert counted == [0, 2 * reads, 0, 2 * reads]
    reported = [record.get(f"{SITE}.reads_per_slot", 0) for record in usage_of(config)]
    assert reported == [0, reads / 36, reads / 36]  # after steps 1, 3 and 4
