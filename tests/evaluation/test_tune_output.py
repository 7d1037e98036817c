"""Tuning an output memory: every number is the loss of a model with that setting."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memlm import UserError, attach_memory
from memlm.data import ByteTokenizer
from memlm.evaluation.tune_output import Tuning, format_table, main, parse_arguments, tune
from tests.memory.law_tools import build_model
from tests.memory.test_knn_lm import add_store, draw_ids
from tests.models.attach_tools import base_model

LAYERS = [{"mixer": {"type": "sliding_attention", "window": 5, "num_heads": 2}, "ffn": "swiglu"}]
CACHE = {"type": "neural_cache", "capacity": 9, "temperature": 0.2}
DOCUMENTS = [draw_ids(1, length, seed=length)[0].numpy() for length in (30, 2, 17)]


def nats(model, **options):
    """Mean negative log-likelihood, a document at a time, with other options of the memory."""
    model = copy.deepcopy(model)
    model.output_memory.config.weight = options["weight"]
    model.output_memory.config.temperature = options.get("temperature", 1.0)
    losses = []
    for document in DOCUMENTS:
        ids = torch.from_numpy(document)[None]
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-log_p.gather(1, ids[0, 1:, None])).flatten().tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["neural_cache", "nearest", "knn_lm"])
@torch.no_grad()
def test_every_number_is_the_loss_of_that_setting(kind, tmp_path):
    if kind == "knn_lm":
        model = add_store(build_model(LAYERS), tmp_path / "s", top_k=6)
    else:
        options = {"top_k": 2} if kind == "nearest" else {}
        model = build_model(LAYERS, output={**CACHE, **options})
    before = copy.deepcopy(model.output_memory.config)
    weights, temperatures = (0.0, 0.1, 0.7), (0.1, 3.0)
    tuning = tune(model, DOCUMENTS, weights, temperatures, batch_size=2, segment=7)
    assert tuning.tokens == 29 + 1 + 16
    # The first token of a document finds something only in a corpus.
    assert tuning.found == pytest.approx(1.0 if kind == "knn_lm" else 43 / 46)
    assert tuning.base == pytest.approx(nats(model, weight=0.0), rel=1e-6)
    for temperature, row in zip(temperatures, tuning.nats, strict=True):
        assert row[0] == pytest.approx(tuning.base, rel=1e-12)
        for weight, value in zip(weights[1:], row[1:], strict=True):
            expected = nats(model, weight=weight, temperature=temperature)
            assert value == pytest.approx(expected, rel=1e-6)
    assert model.output_memory.config == before


def test_temperatures_around_the_memory_s_own():
    tuning = tune(build_model(LAYERS, output=CACHE), DOCUMENTS, (0.1,))
    assert tuning.temperatures == pytest.approx((0.05, 0.1, 0.2, 0.4, 0.8))


def test_behind_a_pretrained_model():
    model = attach_memory(base_model("llama"), {"output": CACHE})
    tuning = tune(model, DOCUMENTS, (0.3,), (0.5,), batch_size=1)
    model.memory.output.config.weight, model.memory.output.config.temperature = 0.3, 0.5
    losses = []
    for document in DOCUMENTS:
        ids = torch.from_numpy(document)[None]
        losses.append(model(ids, labels=ids).loss.item() * (len(document) - 1))
    assert tuning.nats[0][0] == pytest.approx(sum(losses) / tuning.tokens, rel=1e-5)


def test_a_memory_that_only_harms_gets_no_weight():
    """Text in which nothing is ever followed by what followed it before."""
    model = build_model(LAYERS, output=CACHE)
    tuning = tune(model, [np.arange(1, 40)], (0.1, 0.5), (0.2,))
    assert tuning.best == {"weight": 0.0, "temperature": 0.2, "nats": tuning.base}


def test_a_memory_that_helps_is_found():
    """A text said over and over, which a random model does not know."""
    model = build_model(LAYERS, output={**CACHE, "capacity": 40})
    text = np.tile(draw_ids(1, 10, seed=4)[0].numpy(), 8)
    tuning = tune(model, [text], (0.1, 0.9), (0.02, 5.0))
    best = tuning.best
    assert best["weight"] == 0.9 and best["temperature"] == 0.02
    assert best["nats"] < tuning.base / 3


@pytest.mark.parametrize(
    ("weights", "temperatures", "message"),
    [
        ((1.0,), (1.0,), "weights: 1.0 must be at least 0 and below 1"),
        ((-0.1,), (1.0,), "weights: -0.1"),
        ((0.1,), (0.0,), "temperatures: 0.0 must be positive"),
        ((), (1.0,), "at least one each"),
    ],
)
def test_bad_values(weights, temperatures, message):
    with pytest.raises(UserError, match=message):
        tune(build_model(LAYERS, output=CACHE), DOCUMENTS, weights, temperatures)


def test_a_model_without_output_memory():
    with pytest.raises(UserError, match="has no output memory"):
        tune(build_model(LAYERS), DOCUMENTS)


def test_the_table():
    tuning = Tuning(1000, 0.95, 2.5, (0.1, 0.3), (0.5, 1.0), [[2.4, 2.6], [2.3, 2.45]])
    lines = format_table(tuning).splitlines()
    assert lines[1].split() == ["temperature", "0", "0.1", "0.3"]
    assert lines[3].split() == ["0.5", "2.5000", "2.4000", "2.6000"]
    assert lines[4].split() == ["1", "2.5000", "2.3000*", "2.4500"]
    assert "weight 0.1, temperature 1: 2.3000 nats, 0.2000 below" in lines[5]
    assert "measure it on other text" in lines[6]
    assert lines[7] == "At the edge of what was tried: the best temperature."
    inside = Tuning(9, 1.0, 2.5, (0.1, 0.3), (0.5, 1.0, 2.0), [[2.4] * 2, [2.3, 2.4], [2.4] * 2])
    assert len(format_table(inside).splitlines()) == 8
    harmful = Tuning(9, 1.0, 2.5, (0.1,), (0.5,), [[2.6]])
    assert "weight 0, temperature 0.5: 2.5000 nats, 0.0000 below" in format_table(harmful)
    assert "edge" not in format_table(harmful)


def test_the_command(tmp_path, capsys):
    model = build_model(LAYERS, torch.float32)
    model.resize_token_embeddings(259)
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    words = ["--model", str(tmp_path / "model"), "--files", str(text), "--weights", "0.2,0.6"]
    words += ["--out", str(tmp_path / "tuning.json"), "--length", "120"]
    assert main(words) == 2
    assert "has no output memory" in capsys.readouterr().err
    words += ["--output", "{type: neural_cache, capacity: 64}"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "tuning.json").read_text())
    assert result["tokens"] == 119 and result["documents"] == 1
    assert result["output"] == {"type": "neural_cache", "capacity": 64}
    assert len(result["nats"]) == 5 and len(result["nats"][0]) == 2
    assert result["best"]["nats"] <= result["base"] and math.isfinite(result["base"])
    assert f"{result['best']['nats']:.4f}*" in printed
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_on_a_saved_attached_memory(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    attach_memory(base, {"output": CACHE}).save_pretrained(tmp_path / "memory")
    ByteTokenizer().save_pretrained(tmp_path / "memory")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    words = ["--model", str(tmp_path / "memory"), "--files", str(text), "--length", "60"]
    words += ["--out", str(tmp_path / "tuning.json")]
    assert main([*words, "--output", "neural_cache"]) == 2
    assert "what is attached to it" in capsys.readouterr().err
    assert main(words) == 0
    result = json.loads((tmp_path / "tuning.json").read_text())
    assert result["output"] == CACHE and result["best"]["nats"] < result["base"]


def test_models_and_tokenizers_that_do_not_fit(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=259, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    build_model(LAYERS, torch.float32).save_pretrained(tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    words = ["--files", str(text), "--out", str(tmp_path / "out.json"), "--tokenizer", "bytes"]
    for more in ([], ["--output", "neural_cache"]):
        assert main([*words, "--model", str(tmp_path / "llama"), *more]) == 2
        assert "has no place for an output memory" in capsys.readouterr().err
    assert main([*words, "--model", str(tmp_path / "small"), "--output", "neural_cache"]) == 2
    assert "tokenizer: it has 259 tokens" in capsys.readouterr().err


def test_unknown_options():
    with pytest.raises(UserError, match="unknown option --weight; did you mean '--weights'"):
        parse_arguments(["--model", "m", "--out", "o", "--weight", "0.1"])
    with pytest.raises(UserError, match="--weights: 'a,b' is not numbers with commas"):
        parse_arguments(["--model", "m", "--out", "o", "--weights", "a,b"])
    with pytest.raises(UserError, match="--output: '{type: knn_lm' is not YAML"):
        parse_arguments(["--model", "m", "--out", "o", "--output", "{type: knn_lm"])


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    words = ["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "file" / "out.json")]
    assert main(words) == 2
    assert "out.json cannot be written (" in capsys.readouterr().err
