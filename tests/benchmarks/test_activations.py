"""The benchmark of what blocks keep, at a tiny size."""

import json

import pytest
import torch

from benchmarks import activations


@pytest.mark.slow
def test_every_way_is_measured_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(activations, "LENGTH", 64)
    monkeypatch.setattr(activations, "DEPTH", 3)
    sizes = activations.Sizes(32, 48, 16)
    arguments = ["--depths", "4", "--lengths", "64", "--output", str(tmp_path), "--times"]
    assert activations.main(arguments, sizes) == 0
    (path,) = tmp_path.glob("*/activations_cpu.json")
    runs = json.loads(path.read_text())["runs"]
    ways = [activations.name(*way) for way in activations.WAYS]
    assert sorted(runs) == sorted(f"{way}, {n} blocks, 64 tokens" for way in ways for n in (3, 4))
    kept = {way: runs[f"{way}, 4 blocks, 64 tokens"]["kept_bytes"] for way in ways}
    assert kept["keep"] > kept["selective"] > kept["recompute"] > 0
    assert all(run["peak_bytes"] >= run["kept_bytes"] > 0 for run in runs.values())
    assert all(run["gradient_difference"] <= 1e-5 for run in runs.values())
    assert path.with_suffix(".png").exists()
    assert "| recompute, blockwise " in capsys.readouterr().out
    monkeypatch.setattr(activations, "step", None)  # nothing is measured again
    assert activations.main(arguments, sizes) == 0


def test_bytes_are_those_of_storages_that_are_alive():
    weight = torch.randn(64)
    with activations._Living(None, [weight]) as living:
        first = weight * 2
        assert living.now() == first.nbytes
        view = first[:3]
        del first
        assert weight.view(8, 8).shape == (8, 8)  # a view of what was there counts nothing
        assert living.now() == 64 * 4
        del view
        assert living.now() == 0
    assert living.most == 64 * 4
