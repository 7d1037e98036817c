import json
import runpy
import sys
from pathlib import Path

import pytest

from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.main import main, model_names, parse_arguments


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "model"
    tiny_model(memory="gated_delta").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _fails(arguments, capsys) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err and not out
    return last


def test_arguments_reach_the_config():
    words = "--model m,n --output=o --tasks needle,mqar --lengths 128,4k..1M --needle.distance 9"
    words += " --haystack a.txt --perplexity.files [b.txt,c.txt] --seed 3"
    options, config = parse_arguments(words.split())
    assert options == {"model": ["m", "n"], "output": "o", "tokenizer": None}
    expected = EvaluationConfig(tasks=["needle", "mqar"], seed=3)
    expected.lengths, expected.needle.distance = [128, "4k..1M"], 9
    expected.haystack, expected.perplexity.files = ["a.txt"], ["b.txt", "c.txt"]
    assert config == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lenghts 128", "unknown option --lenghts; did you mean 'lengths'?"),
        ("--needle.depths deep", "--needle.depths"),
        ("--model m --output o --lengths 128,x", "lengths: 'x' is no length"),
        ("--model m,m --output o", "--model names 'm' twice"),
        ("--seed", "--seed needs a value"),
        ("needle", "unexpected argument 'needle'"),
        ("--tasks needle", "--model is needed"),
        ("--model m", "--output is needed"),
        ("--model m --output o --tasks neddle", "did you mean 'needle'?"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    assert message in _fails(words.split(), capsys)


def test_names_are_different():
    sources = ["a/x", "a/x-3", "b/x", "c/x", "org/y"]
    assert model_names(sources) == ["x", "x-3", "x-2", "x-4", "y"]


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--needle.depths" in capsys.readouterr().out


def test_whole_command(folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", folder, "--tasks", "needle", "--lengths", "200"]
    words += ["--trials", "4", "--needle.depths", "2", "--haystack", text_file]
    words = [str(word) for word in [*words, "--output", out]]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "recall (%)" in printed and str(out / "report.html") in printed
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "python eval.py " + " ".join(words)
    assert results["runs"][0]["model"]["name"] == "model"
    assert "already holds results.json" in _fails(words, capsys)


def test_entry_point(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "eval.py"
    words = [str(script), "--model", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: model: there is no folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights of"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "weights are damaged"),
        (lambda folder: _change(folder, hidden_size=64), "weights of"),
        (lambda folder: _change(folder, layers=_one_more(folder)), "missing keys: model.layers.2"),
        (lambda folder: _change(folder, hiden_size=64), "did you mean 'hidden_size'?"),
    ],
)
def test_damaged_model(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    found = _fails(["--model", folder, "--output", tmp_path / "out"], capsys)
    assert message in found
    assert not (tmp_path / "out").exists()


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _change(folder, **values):
    (folder / "config.json").write_text(json.dumps(_config(folder) | values))


def _one_more(folder):
    layers = _config(folder)["layers"]
    layers[0]["repeat"] = 3
    return layers
