import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import NeedleOptions
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import ABSENT, CHANGED, Tools

LINE = re.compile(r"# The pass key is (\d+)\.\n")


def _config(text_file, lengths=(200, 400), trials=12, **options):
    needle = NeedleOptions(**({"depths": 3, "distance": 45} | options))
    return EvaluationConfig(
        tasks=["needle"],
        lengths=list(lengths),
        trials=trials,
        needle=needle,
        haystack=[str(text_file)],
        batch_size=6,
        segment=64,
    )


def _task(text_file, **options):
    config = _config(text_file, **options)
    return make_task("needle", Tools(config, ByteTokenizer()))


def _context(trial):
    return ByteTokenizer().decode(trial.context.read(0, len(trial.context)).tolist())


def _judge(model, tokenizer, config, **options):
    return evaluate(model, tokenizer, config, progress=False, **options)["runs"][0]["tasks"]


def _values(tasks, length="400"):
    return {name: score["value"] for name, score in tasks["needle"]["scores"][length].items()}


def test_memory_alone_finds_the_needle(oracle, tokenizer, text_file):
    tasks = _judge(oracle, tokenizer, _config(text_file))
    none = dict.fromkeys(("off", "reset", "swapped", "absent"), 0.0)
    for length in ("200", "400"):
        assert _values(tasks, length) == {"on": 1.0, "changed": 1.0} | none
    task = tasks["needle"]
    assert task["scores"]["400"]["on"]["low"] == pytest.approx(0.7575, abs=1e-3)
    assert task["memory_gain"]["400"]["swapped"]["low"] > 0.5
    assert task["by_memory"]["400"]["value"] == 1.0
    assert {len(depths) for depths in task["depths"].values()} == {3}
    assert {e["count"] for depth in task["depths"]["400"].values() for e in depth.values()} == {4}
    assert oracle.longest_call <= 64
    assert not task["failures"]


def test_wrong_answers_count_nothing(make_oracle, tokenizer, text_file):
    tasks = _judge(make_oracle(wrong=True), tokenizer, _config(text_file))
    assert set(_values(tasks).values()) == {0.0}
    (worst, *_) = tasks["needle"]["failures"]
    assert worst["setting"] == "400"
    expected = worst["answers"][0]["references"][0]
    assert f"# The pass key is {expected}." in worst["excerpt"]


def test_attention_within_reach_needs_no_memory(oracle, tokenizer, text_file):
    """With the needle right before the question every condition but the swap may see it."""
    config = _config(text_file, lengths=[200], trials=4, depths=1, distance=0)
    oracle.WIDTH = 190
    tasks = _judge(oracle, tokenizer, config)
    assert _values(tasks, "200")["reset"] == 1.0


def test_what_the_base_finds_is_not_the_memorys(oracle, tokenizer, text_file, monkeypatch):
    """A model that answers without its memory recalls nothing by it."""
    forward = type(oracle).forward
    monkeypatch.setattr(
        type(oracle),
        "forward",
        lambda self, *a, **k: forward(self, *a, **(k | {"use_memory": True})),
    )
    tasks = _judge(oracle, tokenizer, _config(text_file))
    assert _values(tasks)["on"] == _values(tasks)["off"] == 1.0
    assert tasks["needle"]["by_memory"]["400"]["value"] == 0.0


@given(st.integers(110, 900), st.integers(0, 40), st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=40)
def test_prompts(text_folder, length, index, seed, digits):
    text = text_folder.read_text()
    config = _config(text_folder, lengths=[length], digits=digits, distance=30)
    config.seed = seed
    task = make_task("needle", Tools(config, ByteTokenizer()))
    trial = task.trial(length, index)
    (question,) = trial.questions
    assert len(trial.context) + len(question.token_ids) + digits + 1 == length
    context = _context(trial)
    (line,) = LINE.finditer(context)
    assert (line[1],) == question.references and len(line[1]) == digits
    assert line.start() == trial.labels["position"]
    assert len(context) - line.end() == trial.labels["distance"] >= 30
    assert line.start() == 0 or context[line.start() - 1] == "\n"
    assert LINE.sub("", context, count=1) in 2 * text
    # Lines have at most 40 characters: a border is never further away.
    latest = len(context) - len(line[0]) - 30
    assert abs(line.start() - trial.labels["depth"] * latest) <= 41
    assert ByteTokenizer().decode(question.token_ids.tolist()) == "\n# The pass key is "
    assert line[0].strip() in trial.excerpt


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of a quiet text without keys\n" for i in range(160)))
    return path


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_nearest_border_is_found_however_far(tmp_path, depth, monkeypatch):
    """Lines longer than what is looked through at a time."""
    monkeypatch.setattr("memlm.evaluation.tasks.needle._LOOK", 7)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{'x' * (i % 70)}\n" for i in range(400)))
    task = _task(path, lengths=[600], distance=260)
    for index in range(depth, 60, 3):
        trial = task.trial(600, index)
        context = _context(trial)
        (line,) = LINE.finditer(context)
        text = LINE.sub("", context)
        latest = len(text) - 260
        borders = [0, *(match.end() for match in re.finditer("\n", text))]
        wanted = trial.labels["depth"] * latest
        nearest = min((b for b in borders if b <= latest), key=lambda b: abs(b - wanted))
        assert line.start() == nearest


def test_other_prompts_differ_in_the_needle_alone(text_file):
    task = _task(text_file)
    plain, changed, absent = (task.trial(400, 4, name) for name in ("plain", CHANGED, ABSENT))
    old, new = plain.questions[0].references[0], changed.questions[0].references[0]
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert _context(changed) == _context(plain).replace(old, new)
    assert absent.questions[0].references == (old,)
    assert "pass key" not in _context(absent) and len(absent.context) == len(plain.context)


def test_prompts_repeat_and_differ(text_file):
    task, again = _task(text_file), _task(text_file)
    prints = {task.trial(400, index).fingerprint() for index in range(8)}
    assert prints == {again.trial(400, index).fingerprint() for index in range(8)}
    assert len(prints) == 8


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("{}", 1),
        ("{}.\n#", 1),
        (" {}", 1),
        ("{}0", 0),
        ("0{}", 0),
        ("{:.4}", 0),
        ("{:.4}.", 0),
        ("is {}", 0),
        ("", 0),
    ],
)
def test_the_key_and_nothing_but_the_key(text_file, answer, right):
    task = _task(text_file)
    (question,) = task.trial(400, 0).questions
    assert task.score(question, answer.format(question.references[0])) == right


def test_too_short_for_the_distance(oracle, tokenizer, text_file, tmp_path):
    config = _config(text_file, lengths=[400, 64], distance=60)
    with pytest.raises(UserError, match=r"needle: lengths: 64 tokens are too short.*at least 111"):
        evaluate(oracle, tokenizer, config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_shortest_prompt_works(text_file):
    trial = _task(text_file, lengths=[111], distance=60).trial(111, 2)
    assert trial.labels["position"] == 0 and trial.labels["distance"] == 61


def test_millions_of_tokens_are_not_held(text_file):
    trial = _task(text_file, lengths=[1 << 22]).trial(1 << 22, 1)
    assert all(len(getattr(piece, "ids", ())) < 100 for piece in trial.context.pieces)
    place = trial.labels["position"]
    around = ByteTokenizer().decode(trial.context.read(place - 50, place + 50).tolist())
    assert LINE.search(around)[1] == trial.questions[0].references[0]
    assert len(trial.context.read((1 << 22) - 500, 1 << 22)) == len(trial.context) - (1 << 22) + 500


def test_tokenizers_without_digits(text_file):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(UserError, match="no token for the digit '0'"):
        make_task("needle", Tools(_config(text_file), tokenizer))


def test_vocabularies_without_newlines_hide_needles_anywhere(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *"0123456789", "#", "The", "pass", "key", "is", ".", "word"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    path = tmp_path / "words.txt"
    path.write_text("word " * 500)
    task = make_task("needle", Tools(_config(path, distance=0), tokenizer))
    trial = task.trial(200, 1)
    assert trial.labels["depth"] == 0.5
    assert 80 < trial.labels["position"] < 100
    assert np.array_equal(trial.context.read(0, 80), np.full(80, words.index("word")))


def test_novels_hide_needles():
    folder = os.environ.get("MEMLM_DATA")
    if not folder:
        pytest.skip("MEMLM_DATA is unset: no text corpora here")
    novel = Path(folder) / "gutenberg" / "moby_dick_pg2701.txt"
    trial = _task(novel, lengths=[1 << 16]).trial(1 << 16, 1)
    (line,) = LINE.finditer(_context(trial))
    assert LINE.sub("", _context(trial)) in novel.read_bytes().decode("utf-8")
    assert line[1] == trial.questions[0].references[0]
