from types import SimpleNamespace

import pytest
import torch

from memlm.config import TrainConfig
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.throughput import Throughput, device_name, peak_flops, training_flops

WIDTH, VOCABULARY, LENGTH = 32, 40, 64


def build(mixer=None, ffn=None):
    layer = {"mixer": mixer or {"type": "attention", "num_heads": 2}, "ffn": ffn or "swiglu"}
    config = MemLMConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, layers=[{**layer, "repeat": 3}])
    return MemLMForCausalLM(config)


def matrices(model):
    """Numbers in the matrices that a token is multiplied with; the tied embedding is the head."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_flops_are_six_per_parameter_and_attention():
    model = build()
    seen = (LENGTH + 1) / 2
    assert training_flops(model, LENGTH) == 6 * matrices(model) + 3 * 12 * seen * WIDTH


def test_attention_counts_as_far_as_its_window_reaches():
    model = build({"type": "sliding_attention", "window": 32, "num_heads": 2})
    for window in (32, 8):
        model.set_attention_window(window)
        seen = sum(min(place, window) for place in range(1, LENGTH + 1)) / LENGTH
        expected = 6 * matrices(model) + 3 * 12 * seen * WIDTH
        assert training_flops(model, LENGTH) == pytest.approx(expected)


def test_of_a_value_table_the_rows_that_are_read_count():
    ffn = {"type": "product_key", "num_heads": 2, "top_k": 4}
    small, large = (build(ffn=ffn | {"num_keys": n}) for n in (8, 64))
    keys = sum(
        b.numel() - a.numel()
        for (name, a), b in zip(small.named_parameters(), large.parameters(), strict=True)
        if name.endswith("keys")
    )
    assert keys > 0
    assert training_flops(large, LENGTH) - training_flops(small, LENGTH) == 6 * keys
    tables = sum(
        p.numel() for name, p in large.named_parameters() if name.endswith(".values.weight")
    )
    assert training_flops(large, LENGTH) < 6 * tables


def test_frozen_matrices_have_no_weight_gradient():
    model = build()
    whole = training_flops(model, LENGTH)
    frozen = model.model.layers[0].ffn.module.requires_grad_(False)
    assert whole - training_flops(model, LENGTH) == 2 * sum(p.numel() for p in frozen.parameters())


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_of_known_devices(name, bf16, fp32):
    assert peak_flops(name, "bf16") == bf16 * 1e12
    assert peak_flops(name, "no") == fp32 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA Unheard 9",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
    ],
)
def test_other_devices_have_no_peak(name):
    assert peak_flops(name, "bf16") is None


def test_products_in_tf32_have_a_peak_of_their_own(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-40GB", "no") == 156e12


class Processes:
    """Processes of which the other ones have waited for rows, and hold more memory."""

    device = torch.device("cpu")

    def __init__(self, count):
        self.num_processes = count

    def gather(self, mine):
        others = mine + torch.tensor([0, 0.25, 0, 1e9], dtype=torch.float64)
        return torch.cat([mine] + [others] * (self.num_processes - 1))


@pytest.mark.parametrize("processes", [1, 2])
def test_means_over_the_steps_since_the_last_report(processes):
    options = TrainConfig(length=LENGTH, tokens_per_step=LENGTH)
    model = build()
    speed = Throughput(model, options, Processes(processes))
    assert speed.device == device_name(torch.device("cpu")) == "cpu"
    speed.step(100.0, 1.0)  # compiles
    first = speed.report(LENGTH, None, 10)
    assert first["tokens_per_second"] == LENGTH / 100 and first["seconds_left"] is None
    assert first["mfu"] is None

    speed.peak = 1e6
    speed.logged(0.5)  # of the first report
    speed.step(2.0, 0.5)
    speed.logged(0.1)
    speed.step(3.0, 1.0)
    found = speed.report(LENGTH, None, 4)
    assert found["step_seconds"] == pytest.approx((0.5 + 2 + 0.1 + 3) / 2)
    assert found["log_seconds"] == pytest.approx(0.3)
    assert found["data_seconds"] == pytest.approx(0.75 + 0.25 * (processes - 1))
    assert found["tokens_per_second"] == pytest.approx(LENGTH / 2.8)
    assert found["seconds_left"] == pytest.approx(4 * (2.1 + 3) / 2)
    assert found["flops_per_token"] == training_flops(model, LENGTH)
    expected = training_flops(model, LENGTH) * LENGTH / 2.8 / (1e6 * processes)
    assert found["mfu"] == pytest.approx(expected)
    more = 1e9 * (processes - 1)
    assert more + 1e8 < found["memory_bytes"] < more + 1e11


def test_time_left_follows_the_latest_steps():
    speed = Throughput(
        build(), TrainConfig(), SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    )
    for seconds in [60.0] + [9.0] * 200 + [1.0] * 50:
        speed.step(seconds, 0.0)
    assert speed.report(LENGTH, None, 7)["seconds_left"] == pytest.approx(7.0)


def test_a_run_records_where_its_time_goes(make_config):
    config = make_config(steps=6, log_every=3)
    Trainer(config).run()
    records = read_metrics(config.output_dir / METRICS_FILE)
    assert [record["step"] for record in records] == [1, 3, 6]
    for record in records:
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(256)
        assert 0 < record["data_seconds"] < record["step_seconds"]
        assert 0 <= record["log_seconds"] < record["step_seconds"]
        assert record["mfu"] is None and record["memory_bytes"] > 1e7
    assert records[0]["log_seconds"] < records[1]["log_seconds"]  # the first has told of nothing
    assert records[-1]["seconds_left"] == 0
