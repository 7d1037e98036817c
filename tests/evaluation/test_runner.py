import json

import pytest

from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import MqarOptions, NeedleOptions, PerplexityOptions
from memlm.evaluation.report import format_table
from memlm.evaluation.runner import check_output


def small(text_file, tasks=("needle", "mqar", "perplexity"), **options) -> EvaluationConfig:
    """Every task at a few hundred tokens."""
    files = [str(text_file), str(text_file.with_name("other.txt"))]
    text_file.with_name("other.txt").write_text(text_file.read_text()[::-1])
    return EvaluationConfig(
        tasks=list(tasks),
        needle=NeedleOptions(lengths=[150], depths=2, trials=4, files=files[:1]),
        mqar=MqarOptions(length=24, pairs=[3], rows=4),
        perplexity=PerplexityOptions(length=80, documents=2, segment=32, files=files),
        segment=64,
        **options,
    )


MODELS = {
    "gated_delta": {"memory": "gated_delta"},
    "titans": {"memory": "titans"},
    "knn_cache": {"memory": {"type": "knn_cache", "segment": 8}},
    "product_key": {"ffn": {"type": "product_key", "num_keys": 8, "num_heads": 1, "top_k": 2}},
    "transformer": {"mixer": "attention"},
}
CONDITIONS = {"product_key": ["on", "off", "zeroed"], "transformer": ["on"]}


@pytest.mark.parametrize("name", MODELS)
def test_every_memory_is_evaluated(tiny_model, tokenizer, text_file, tmp_path, name):
    model = tiny_model(**MODELS[name]).train()
    out = tmp_path / "new" / "out"
    results = evaluate(model, tokenizer, small(text_file), out, "the command", progress=False)
    assert model.training
    assert results["conditions"] == CONDITIONS.get(name, ["on", "off", "reset", "swapped"])
    assert json.loads((out / "results.json").read_text()) == results
    for task in results["tasks"].values():
        for scores in task["scores"].values():
            assert list(scores) == results["conditions"]
            for score in scores.values():
                assert score["low"] <= score["value"] <= score["high"]
    stateless = name in CONDITIONS
    assert (results["tasks"]["mqar"]["cost"]["memory_state_bytes"] == 0) == stateless
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "report.html",
        "needle_heatmap.png",
        "needle_recall.png",
        "mqar_accuracy.png",
        "perplexity_by_position.png",
    }


def test_results_repeat(gated_delta, tokenizer, text_file):
    first, second = (
        evaluate(gated_delta, tokenizer, small(text_file), progress=False) for _ in range(2)
    )
    for task in first["tasks"]:
        assert first["tasks"][task]["scores"] == second["tasks"][task]["scores"]


def test_segments_do_not_change_the_results(gated_delta, tokenizer, text_file):
    whole = evaluate(gated_delta, tokenizer, small(text_file), progress=False)
    config = small(text_file)
    config.segment = 13
    cut = evaluate(gated_delta, tokenizer, config, progress=False)
    for task in ("needle", "mqar"):
        assert whole["tasks"][task]["scores"] == cut["tasks"][task]["scores"]


def test_results_are_never_overwritten(oracle, tokenizer, text_file, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(UserError, match="already holds results.json"):
        evaluate(oracle, tokenizer, small(text_file), tmp_path, progress=False)
    assert (tmp_path / "results.json").read_text() == "precious"
    assert oracle.calls == 0


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no writable folder"):
        check_output(tmp_path / "file" / "out")


@pytest.mark.parametrize("task", ["needle", "mqar", "perplexity"])
def test_longer_than_full_attention_allows(tiny_model, tokenizer, text_file, tmp_path, task):
    model = tiny_model(mixer="attention", max_position_embeddings=20)
    with pytest.raises(UserError, match=rf"{task}: .* longer .* full attention allows \(20\)"):
        evaluate(model, tokenizer, small(text_file, [task]), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model(tiny_model, tokenizer, text_file):
    with pytest.raises(UserError, match="259 tokens, the model knows 200"):
        evaluate(tiny_model(vocab_size=200), tokenizer, small(text_file), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["needel"]}, r"unknown task 'needel'; did you mean 'needle'\?"),
        ({"tasks": []}, "tasks: empty"),
        ({"batch_size": 1}, "batch_size: 1 is too small; the least is 2"),
        ({"needle": NeedleOptions(trials=3)}, "needle.trials: 3 is too small; the least is 5"),
        ({"needle": NeedleOptions(lengths=[])}, "needle.lengths: empty"),
        ({"needle": NeedleOptions(distance=-1)}, "needle.distance: -1"),
        ({"mqar": MqarOptions(pairs=[])}, "mqar.pairs: empty"),
        ({"mqar": MqarOptions(length=40, pairs=[11])}, "mqar.length: 40 .* least is 44"),
        ({"perplexity": PerplexityOptions(documents=1)}, "perplexity.documents: 1"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**options).validate()


def test_missing_text_file(oracle, tokenizer, tmp_path):
    needle = NeedleOptions(lengths=[200], trials=5, distance=0, files=[str(tmp_path / "no.txt")])
    config = EvaluationConfig(tasks=["needle"], needle=needle)
    with pytest.raises(UserError, match=r"no\.txt"):
        evaluate(oracle, tokenizer, config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_standard_library_is_the_default_text(gated_delta, tokenizer):
    perplexity = PerplexityOptions(length=64, documents=4, segment=32)
    config = EvaluationConfig(tasks=["perplexity"], perplexity=perplexity)
    task = evaluate(gated_delta, tokenizer, config, progress=False)["tasks"]["perplexity"]
    assert task["tokens"] == 4 * 64


def test_table_and_report(oracle, tokenizer, text_file, tmp_path):
    config = small(text_file, ["needle"])
    config.needle.distance = 45
    results = evaluate(
        oracle, tokenizer, config, tmp_path / "out", "python eval.py --model 'a <b>'",
        name="a <b>", progress=False,
    )  # fmt: skip
    head, line, row, *_ = format_table(results).splitlines()
    assert head.split() == ["task", "setting", "on", "off", "reset", "swapped"]
    assert set(line) == {"-"}
    assert row.startswith("needle, recall (%)  150 tokens  100.0 [51.0, 100.0]  0.0 [0.0, 49.0]")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "python eval.py --model &#x27;a &lt;b&gt;&#x27;" in page
    assert "<b>" not in page.split("</title>")[0]
    for outside in ("http:", "https:", "<script", "<link", "url("):
        assert outside not in page
    assert page.count("data:image/png;base64,") == 4  # two plots, light and dark
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
