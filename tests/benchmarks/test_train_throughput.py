"""Like is compared with like: the same model, the same rows, the same loss."""

import dataclasses
import functools
import json

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import report, train_throughput
from benchmarks.train_throughput import (
    Run,
    Size,
    copy_weights,
    llama,
    our_config,
    summary,
    train_ours,
    train_theirs,
)
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.loss import RowLoss

TINY = Size("tiny", 16, 2, 4, 2, 32, 300, False, 32, 2)


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """The command sets the variable; accelerate keeps its state for the whole process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_are_one(tied, tmp_path):
    size = dataclasses.replace(TINY, tied=tied)
    config = our_config(size, 10, tmp_path / "text.txt", tmp_path / "run")
    ours = MemLMForCausalLM(MemLMConfig.from_mapping(config.model)).double()
    theirs = llama(size).double()
    copy_weights(ours, theirs)
    count = sum(weight.numel() for weight in ours.parameters())
    assert count == sum(weight.numel() for weight in theirs.parameters())

    tokens = torch.randint(0, size.vocabulary, (size.rows, size.length + 1))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}
    positions = torch.arange(size.length).expand(size.rows, -1)
    whole = batch | {"segment_ids": torch.ones_like(positions), "position_ids": positions}
    loss, sums, _ = RowLoss(ours)(whole | {"loss_groups": torch.zeros_like(positions)})
    found = theirs(**batch, shift_labels=batch["labels"]).loss
    assert sums.sum().item() / size.tokens == pytest.approx(found.item(), rel=1e-6)

    loss.backward()
    found.backward()
    of_ours = ours.model.layers[1].mixer.module.k_proj.weight.grad / size.tokens
    of_theirs = theirs.model.layers[1].self_attn.k_proj.weight.grad
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-5, atol=1e-9)


def test_other_sizes_are_refused(tmp_path):
    config = our_config(TINY, 10, tmp_path / "text.txt", tmp_path / "run")
    ours = MemLMForCausalLM(MemLMConfig.from_mapping(config.model))
    with pytest.raises(ValueError, match="embed_tokens"):
        copy_weights(ours, llama(dataclasses.replace(TINY, vocabulary=301)))
    with pytest.raises(ValueError, match="has no model.layers.1"):
        copy_weights(ours, llama(dataclasses.replace(TINY, layers=1)))


def test_medians_of_the_rounds():
    pieces = dict.fromkeys(train_throughput.PIECES, 0.1) | {"rows": 0.01, "log": 0.02}
    ours = [Run(1.0, 0.5, [3.0, 2.0], pieces, 7) for _ in range(3)]
    theirs = [Run(seconds, 0.4, [3.0, 2.0], {}, 7) for seconds in (0.9, 1.5, 9.0)]
    found = summary(TINY, {"ours": ours, "theirs": theirs})
    assert found["ratios"] == pytest.approx([0.9, 1.5, 9.0]) and found["ratio"] == 1.5
    assert found["cpu_ratio"] == pytest.approx(0.8)
    assert found["tokens_per_second"]["ours"] == 64
    assert found["rows_and_log"] == pytest.approx(0.03)
    assert found["shares"]["other"] == pytest.approx(1 - 0.43)


def test_both_sides_train_from_the_same_loss(tmp_path, fresh_accelerator):
    text = train_throughput.write_text(tmp_path / "text.txt")
    turns = []
    runs = {
        side: train_side(our_config(TINY, 9, text, tmp_path / side), lambda: turns.append(None))
        for side, train_side in (
            ("ours", train_ours),
            ("theirs", functools.partial(train_theirs, TINY)),
        )
    }
    assert len(turns) == 2 * 9
    assert runs["ours"].parameters == runs["theirs"].parameters
    # The first step, and the last: theirs is the mean since then.
    assert runs["ours"].losses[0] == pytest.approx(runs["theirs"].losses[0], abs=1e-5)
    assert all(run.seconds > 0 and run.cpu_seconds > 0 for run in runs.values())
    pieces = runs["ours"].pieces
    assert all(pieces.values()) and sum(pieces.values()) < runs["ours"].seconds


def test_the_command(tmp_path, monkeypatch, capsys):
    pieces = dict.fromkeys(train_throughput.PIECES, 0.1) | {"rows": 0.01, "log": 0.005}
    runs = {"ours": Run(1.0, 1.0, [3.0], pieces, 7), "theirs": Run(1.1, 1.2, [3.0], {}, 7)}
    raced = []
    monkeypatch.setattr(train_throughput, "SIZES", (TINY,))
    monkeypatch.setattr(train_throughput, "race", lambda sides: raced.append(list(sides)) or runs)
    words = f"--device cpu --rounds 2 --output {tmp_path}".split()
    assert train_throughput.main(words) == 0
    assert raced == [["ours", "theirs"], ["theirs", "ours"]]
    assert "| tiny |" in capsys.readouterr().out
    path = tmp_path / report.machine_name() / "train_throughput.json"
    entry = json.loads(path.read_text())["sizes"]["tiny"]
    assert entry["ratio"] == pytest.approx(1.1) and entry["rows_and_log"] == pytest.approx(0.015)

    for slower in (
        {"ours": dataclasses.replace(runs["ours"], seconds=1.2)},
        {"ours": dataclasses.replace(runs["ours"], pieces=pieces | {"log": 0.1})},
    ):
        monkeypatch.setattr(train_throughput, "race", lambda sides, now=runs | slower: now)
        assert train_throughput.main(words) == 1

    for other in ({"losses": [3.1]}, {"parameters": 8}):
        now = runs | {"ours": dataclasses.replace(runs["ours"], **other)}
        monkeypatch.setattr(train_throughput, "race", lambda sides, now=now: now)
        with pytest.raises(ValueError, match="differ"):
            train_throughput.main(words)
