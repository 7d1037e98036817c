"""Models of equal size, and ratios that are what they say."""

import pytest
import torch

from benchmarks import generate
from benchmarks.generate import Size, below, compare, counted, makers, matched, measure, tables

TINY = Size(hidden_size=64, intermediate_size=704, vocabulary=64, longest=256)


def test_all_models_have_as_many_parameters():
    with torch.device("meta"):
        parameters = counted(makers(Size())["llama"](Size().intermediate_size))
        for make in makers(Size()).values():
            assert abs(counted(matched(make, parameters)) / parameters - 1) < 0.02


def test_models_that_cannot_be_matched_are_refused():
    with pytest.raises(ValueError, match="are wanted"):
        matched(makers(TINY)["llama"], 1000)


def test_what_is_measured_is_compared(monkeypatch):
    decoded = []
    decode = generate.Decoder.decode
    monkeypatch.setattr(
        generate.Decoder, "decode", lambda self, tokens: decoded.append(decode(self, tokens))
    )
    measured = measure(TINY, (8, 16), 2, 4, 1, ["llama", "gated_delta"])
    assert all(ids.shape == (2, 4) for ids in decoded)
    results = compare(measured)
    own = results["gated_delta"]["contexts"][8]
    assert len(own["seconds"]) == 1 and min(own["seconds"]) > 0
    assert own["state_bytes"] == results["gated_delta"]["contexts"][16]["state_bytes"]
    llama = results["llama"]["contexts"]
    assert llama[8]["state_bytes"] == 7 * 4 * 2 * 64 * 4 and "ratios" not in llama[8]
    assert set(own["ratios"]) == {"llama"}
    assert all(name in tables(results) for name in results)


def test_a_ratio_below_the_bar_and_a_growing_token_are_named():
    def entry(short, long):
        times = {8: [short, short], 16: [long, long]}
        contexts = {
            n: {"seconds": s, "processor_seconds": s, "state_bytes": 1} for n, s in times.items()
        }
        return {"parameters": 1, "value_tables": 0, "contexts": contexts}

    results = compare({"llama": entry(2.0, 4.0), "titans": entry(1.0, 5.0)})
    assert results["titans"]["contexts"][8]["ratios"]["llama"]["seconds"] == 2
    assert results["titans"]["change"]["seconds"] == 5
    found = below(results)
    assert len(found) == 2 and "titans after 16: 0.80 of llama" in found[0]
    assert "5.00 times" in found[1]
