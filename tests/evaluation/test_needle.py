import numpy as np
import pytest

from memlm.data.passkey import make_needle
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import NeedleOptions
from memlm.evaluation.tasks.needle import place_needle


def _config(text_file, **options):
    defaults = {"lengths": [200, 400], "depths": 3, "trials": 12, "distance": 45}
    needle = NeedleOptions(**(defaults | options), files=[str(text_file)])
    return EvaluationConfig(tasks=["needle"], needle=needle, batch_size=6, segment=64)


def _values(results, length="400"):
    scores = results["tasks"]["needle"]["scores"][length]
    return {name: score["value"] for name, score in scores.items()}


def test_memory_alone_finds_the_needle(oracle, tokenizer, text_file):
    results = evaluate(oracle, tokenizer, _config(text_file), progress=False)
    for length in ("200", "400"):
        assert _values(results, length) == {"on": 1.0, "off": 0.0, "reset": 0.0, "swapped": 0.0}
    task = results["tasks"]["needle"]
    assert task["scores"]["400"]["on"]["low"] == pytest.approx(0.7575, abs=1e-3)
    assert task["memory_gain"]["400"]["swapped"]["low"] > 0.5
    assert len(task["cells"]) == 2 * 3 * 4
    assert {cell["score"]["count"] for cell in task["cells"]} == {4}
    assert oracle.longest_call <= 64


def test_wrong_answers_count_nothing(make_oracle, tokenizer, text_file):
    results = evaluate(make_oracle(wrong=True), tokenizer, _config(text_file), progress=False)
    assert set(_values(results).values()) == {0.0}


def test_swapped_rows_answer_with_another_key(oracle, tokenizer, text_file, monkeypatch):
    # Equal keys everywhere: another document's memory then holds the right answer.
    monkeypatch.setattr(
        "memlm.evaluation.tasks.needle.make_needle",
        lambda *arguments: _same_key(arguments),
    )
    results = evaluate(oracle, tokenizer, _config(text_file), progress=False)
    assert _values(results) == {"on": 1.0, "off": 0.0, "reset": 0.0, "swapped": 1.0}


def _same_key(arguments):
    tokenizer, haystack, length, depth, _, digits = arguments
    return make_needle(tokenizer, haystack, length, depth, np.random.default_rng(7), digits)


def test_attention_within_reach_needs_no_memory(oracle, tokenizer, text_file):
    """With the needle right before the question every condition but the swap may see it."""
    config = _config(text_file, lengths=[200], depths=1, trials=4, distance=0)
    oracle.WIDTH = 190
    results = evaluate(oracle, tokenizer, config, progress=False)
    assert _values(results, "200")["reset"] == 1.0


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_place_keeps_the_distance(tokenizer, depth):
    text = "".join(f"{'x' * (i % 70)}\n" for i in range(400)).encode()
    haystack = np.frombuffer(text, dtype=np.uint8)
    places = []
    for trial in range(20):
        needle = place_needle(tokenizer, haystack, 600, depth, (0, trial), 5, 260)
        context = bytes(needle.context_ids.tolist())
        line = b"# The pass key is " + needle.answer_text.encode() + b"\n"
        assert context[needle.position :].startswith(line)
        assert len(context) - needle.position - len(line) >= 260
        assert len(context) + len(needle.question_ids) + len(needle.answer_ids) == 600
        places.append(needle.position)
    assert max(places) <= 70 if depth == 0 else max(places) >= 100


def test_too_short_for_the_distance(oracle, tokenizer, text_file, tmp_path):
    config = _config(text_file, lengths=[400, 64], distance=60)
    with pytest.raises(UserError, match=r"needle.lengths: 64 tokens are too short.*at least 111"):
        evaluate(oracle, tokenizer, config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_shortest_prompt_works(tokenizer, text_file):
    haystack = np.frombuffer(text_file.read_bytes(), dtype=np.uint8)
    needle = place_needle(tokenizer, haystack, 111, 1.0, (0,), 5, 60)
    assert needle.position == 0
