import json

import pytest
import torch

from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import MqarOptions, NeedleOptions, NiahOptions, PerplexityOptions
from memlm.evaluation.prompts import Trial
from memlm.evaluation.results import check_output


def small(text_file, tasks=("needle", "mqar", "perplexity"), **options) -> EvaluationConfig:
    """Every task at a few hundred tokens."""
    files = [str(text_file), str(text_file.with_name("other.txt"))]
    text_file.with_name("other.txt").write_text(text_file.read_text()[::-1])
    return EvaluationConfig(
        tasks=list(tasks),
        lengths=[150],
        trials=4,
        needle=NeedleOptions(depths=2),
        haystack=files[:1],
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
CONTROLS = ["changed", "absent"]
WRITTEN = ("gated_delta", "transformer")  # drawing a report takes seconds


@pytest.mark.parametrize("name", MODELS)
def test_every_memory_is_evaluated(tiny_model, tokenizer, text_file, tmp_path, name):
    model = tiny_model(**MODELS[name]).train()
    out = tmp_path / "new" / "out" if name in WRITTEN else None
    results = evaluate(model, tokenizer, small(text_file), out, "the command", progress=False)
    assert model.training
    (run,) = results["runs"]
    conditions = CONDITIONS.get(name, ["on", "off", "reset", "swapped"])
    assert run["conditions"] == [*conditions, *CONTROLS]
    for task, found in run["tasks"].items():
        expected = [*conditions, *CONTROLS] if task == "needle" else conditions
        for scores in found["scores"].values():
            assert list(scores) == expected
            for score in scores.values():
                assert score["low"] <= score["value"] <= score["high"]
        for cost in found["cost"].values():
            assert cost["state_bytes"] == cost["memory_state_bytes"] + cost["key_value_bytes"]
            assert (cost["memory_state_bytes"] == 0) == (name in CONDITIONS)
            assert cost["peak_memory_bytes"] > 1e6
    if out is not None:
        assert json.loads((out / "results.json").read_text()) == results
        assert {"results.json", "report.html", "evaluation.json", "records"} < {
            path.name for path in out.iterdir()
        }


def test_results_repeat(gated_delta, tokenizer, text_file):
    first, second = (
        evaluate(gated_delta, tokenizer, small(text_file), progress=False) for _ in range(2)
    )
    for name, task in first["runs"][0]["tasks"].items():
        assert task["scores"] == second["runs"][0]["tasks"][name]["scores"]


def test_segments_do_not_change_the_results(gated_delta, tokenizer, text_file):
    whole = evaluate(gated_delta, tokenizer, small(text_file), progress=False)
    config = small(text_file)
    config.segment = 13
    cut = evaluate(gated_delta, tokenizer, config, progress=False)
    for task in ("needle", "mqar"):
        first, second = (found["runs"][0]["tasks"][task] for found in (whole, cut))
        assert first["scores"] == second["scores"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("capacity", [64, 16])
def test_the_config_is_part_of_a_model(tiny_model, tokenizer, text_file, tmp_path, capacity):
    """Weights alone do not tell how many entries a cache holds."""
    models = []
    for entries in (64, capacity):
        torch.manual_seed(0)
        cache = {"type": "knn_cache", "segment": 8, "capacity": entries}
        models.append(tiny_model(memory=cache))
    config = small(text_file, ["mqar"])
    first = evaluate(models[0], tokenizer, config, tmp_path, progress=False)
    (tmp_path / "results.json").unlink()
    if capacity != 64:
        with pytest.raises(UserError, match=r"another evaluation \(models differ\)"):
            evaluate(models[1], tokenizer, config, tmp_path, progress=False)
        return
    again = evaluate(models[1], tokenizer, config, tmp_path, progress=False)
    assert again["seconds"] == first["seconds"]  # nothing ran again
    assert again["runs"][0]["model"]["device"] == "cpu"


def test_no_memory_left(oracle, tokenizer, text_file, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(oracle, "forward", full)
    message = "needle: model has no memory left on cpu for 4 rows of 150; use a smaller batch_size"
    with pytest.raises(UserError, match=message):
        evaluate(oracle, tokenizer, small(text_file, ["needle"]), tmp_path, progress=False)


def test_a_prompt_is_hashed_once(oracle, tokenizer, text_file, monkeypatch):
    hashed, original = [], Trial.fingerprint
    monkeypatch.setattr(Trial, "fingerprint", lambda self: hashed.append(1) or original(self))
    evaluate(oracle, tokenizer, small(text_file, ["needle"]), progress=False)
    assert len(hashed) == 4 * 4  # trials x readings: on, off, changed, absent


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
    message = rf"{task}: .* longer than the full attention of model allows \(20\)"
    with pytest.raises(UserError, match=message):
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
        ({"trials": 1}, "trials: 1 is too small; the least is 2"),
        ({"long_trials": 1}, "long_trials: 1 is too small"),
        ({"lengths": []}, "lengths: empty"),
        ({"lengths": [16]}, "lengths: 16 is too small; the least is 32"),
        ({"lengths": ["4kb"]}, "lengths: '4kb' is no length; valid are 4096, 4k, 1M and 4k..64k"),
        ({"lengths": ["9" * 20]}, "lengths: '9999.*' is no length"),
        ({"lengths": ["8k..4k"]}, "lengths: the range '8k..4k' ends below its start"),
        ({"long_length": "far"}, "long_length: 'far' is no length"),
        ({"conditions": ["of"]}, r"unknown condition 'of'; did you mean 'off'\?"),
        ({"seed": -1}, "seed: -1"),
        ({"niah": NiahOptions(needles=0)}, "niah.needles: 0"),
        ({"mqar": MqarOptions(power=0.0)}, "mqar.power: 0.0 is too small"),
        ({"mqar": MqarOptions(overwritten=2.0)}, "mqar.overwritten: 2.0 is no share"),
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
    config = EvaluationConfig(tasks=["needle"], haystack=[str(tmp_path / "no.txt")])
    with pytest.raises(UserError, match=r"no\.txt"):
        evaluate(oracle, tokenizer, config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_standard_library_is_the_default_text(gated_delta, tokenizer):
    perplexity = PerplexityOptions(length=64, documents=4, segment=32)
    config = EvaluationConfig(tasks=["perplexity"], perplexity=perplexity)
    results = evaluate(gated_delta, tokenizer, config, progress=False)
    task = results["runs"][0]["tasks"]["perplexity"]
    assert task["tokens"] == 4 * 64
