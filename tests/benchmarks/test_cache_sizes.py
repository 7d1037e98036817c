"""Sizes of a kNN cache on a miniature: runs are kept, losses are those of the whole document."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import cache_sizes, cache_sizes_report
from benchmarks.cache_sizes import BASE, CACHE, Settings
from memlm.errors import UserError
from memlm.models import MemLMConfig, MemLMForCausalLM

TINY = Settings(
    hidden_size=32,
    layers=2,
    window=16,
    cache_layers=1,
    capacity=64,
    steps=2,
    length=64,
    rows=2,
    held_out=0.5,
    shortest=200,
    longest=500,
)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for letter in "abcdefgh":
        text = "".join(f"line {number} of {letter}\n" for number in range(60))
        (folder / f"{letter}.txt").write_text(text)
    return str(folder)


def tiny_model(kind):
    torch.manual_seed(0)
    config = MemLMConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        layers=cache_sizes.layer_patterns(kind, TINY),
    )
    return MemLMForCausalLM(config).eval()


def test_runs_are_kept_and_told(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_sizes, "SIZES", (0, 16, 64))
    monkeypatch.setattr(cache_sizes, "EDGES", (0, 100))
    arguments = ["--seeds", "3", "--files", files, "--runs", str(tmp_path / "runs")]
    arguments += ["--output", str(tmp_path / "results")]
    assert cache_sizes.main(arguments, TINY) == 0
    (path,) = tmp_path.glob("results/*/cache_sizes_files.json")
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {f"{BASE}, seed 3", f"{CACHE}, seed 3"}
    base, cache = runs[f"{BASE}, seed 3"], runs[f"{CACHE}, seed 3"]
    assert base["documents"] == cache["documents"] and len(base["documents"]) >= 2
    assert set(base["sizes"]) == {"0"} and set(cache["sizes"]) == {"0", "16", "64"}
    for found in (*base["sizes"].values(), *cache["sizes"].values()):
        assert len(found["bits_per_byte"]) == len(base["documents"])
        assert set(found["by_position"]) == {"0", "100"}
        assert 1 < found["perplexity"] < 259 * 2
    small, large = (cache["sizes"][size]["state_bytes"] for size in ("16", "64"))
    assert 0 < small < large
    assert cache["zero_gates_give_the_base"] is True
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| cache off " in printed and "| 64 entries " in printed

    assert cache_sizes.main(arguments, TINY) == 0
    assert json.loads(path.read_text())["runs"] == runs  # nothing is trained twice


def test_models_are_trained_alike():
    base, cache = (cache_sizes.run_config(kind, 1, Settings(), None) for kind in (BASE, CACHE))
    assert base.train == cache.train and base.data == cache.data
    assert base.train.carry_state and base.data.carry
    windows = {pattern["mixer"]["window"] for pattern in cache.model["layers"]}
    assert windows == {256}
    for pattern in cache.model["layers"]:
        pattern.pop("memory", None)
    repeats = [sum(p["repeat"] for p in config.model["layers"]) for config in (base, cache)]
    assert repeats == [3, 3]


def test_reading_in_parts_gives_the_losses_of_the_whole(monkeypatch):
    monkeypatch.setattr(cache_sizes, "READ", 50)
    monkeypatch.setattr(cache_sizes, "EDGES", (0, 100))
    model = tiny_model(CACHE)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, length) for length in (90, 173, 200)]
    found = cache_sizes.read_documents(model, documents, use_memory=True)
    losses = []
    for document in documents:
        tokens = torch.from_numpy(document)[None]
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none") / math.log(2))
    torch.testing.assert_close(
        torch.tensor(found["bits_per_byte"]), torch.stack([loss.mean() for loss in losses])
    )
    every = torch.cat(losses)
    assert found["perplexity"] == pytest.approx(2 ** every.mean().item(), rel=1e-4)
    late = torch.cat([loss[100:] for loss in losses]).mean().item()
    assert found["by_position"]["100"] == pytest.approx(late, rel=1e-4)
    off = cache_sizes.read_documents(model, documents, use_memory=False)
    assert off["bits_per_byte"] != found["bits_per_byte"] and off["state_bytes"] == 0


def test_only_the_capacity_changes():
    model = tiny_model(CACHE)
    larger = cache_sizes.with_capacity(model, 128)
    assert larger.config.layers[-1]["memory"]["capacity"] == 128
    assert model.config.layers[-1]["memory"]["capacity"] == 64
    for (name, weight), (same, other) in zip(
        model.state_dict().items(), larger.state_dict().items(), strict=True
    ):
        assert name == same and torch.equal(weight, other)


def test_gates_at_zero_give_the_bits_of_the_base_and_others_do_not():
    model = tiny_model(CACHE)
    document = np.arange(150) % 256
    plain = cache_sizes.without_cache(model)
    assert plain.memory_state_names() == []
    assert cache_sizes.same_logits(cache_sizes.with_zero_gates(model), plain, document)
    assert not cache_sizes.same_logits(model, plain, document)


def test_differences_are_paired():
    def reading(bits):
        return {"bits_per_byte": bits}

    runs = {
        f"{BASE}, seed 0": {"sizes": {"0": reading([2.0, 4.0, 6.0])}},
        f"{CACHE}, seed 0": {"sizes": {"0": reading([2.1, 4.1, 6.1]), "9": reading([1.9, 3.9, 6])}},
    }
    gain = cache_sizes_report.difference(runs, 0, (CACHE, 0), (CACHE, 9))
    assert gain.value == pytest.approx(0.5 / 3) and gain.low == pytest.approx(0.1)
    assert gain.high == pytest.approx(0.2) and gain.excludes(0)
    assert cache_sizes_report.difference(runs, 0, (BASE, 0), (CACHE, 0)).high < 0


def test_too_few_long_documents_are_one_sentence(files):
    with pytest.raises(UserError, match="0 held-out documents have 20000 bytes"):
        cache_sizes.long_documents(Settings(held_out=0.5), [files])
