"""Time and memory of an evaluation."""

import time

import pytest
import torch

from memlm.evaluation.costs import Meter, PeakMemory


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_what_a_gpu_still_works_on_counts_where_it_was_asked_for(monkeypatch, kind):
    """Calls to a GPU return before it has done anything."""
    waiting = []

    def synchronize(device):
        assert device == torch.device("cuda", 1)
        time.sleep(sum(waiting))
        waiting.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    meter = Meter(None, torch.device(kind, 1) if kind == "cuda" else torch.device(kind))
    waiting.append(0.2)  # of something before
    with meter.measure("read", 100):
        waiting.append(0.1)
    with meter.measure("generate", 5):
        pass
    if kind == "cpu":
        assert waiting == [0.2, 0.1]
        return
    assert 0.1 <= meter.seconds["read"] < 0.2
    assert meter.seconds["generate"] < 0.1
    assert meter.tokens == {"read": 100, "generate": 5}


def test_the_peak_is_of_the_time_since_it_was_made():
    big = torch.ones(64 << 20, dtype=torch.uint8)
    del big
    peak = PeakMemory(torch.device("cpu"))
    before = peak.bytes()
    big = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.bytes() - before > 60 << 20
    del big
    assert PeakMemory(torch.device("cpu")).bytes() - before < 8 << 20
