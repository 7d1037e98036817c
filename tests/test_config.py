import runpy
import sys
from pathlib import Path

import pytest

from memlm.config import RunConfig, Stage, TrainConfig, load_config, save_config
from memlm.errors import UserError
from memlm.yaml_tree import parse_overrides

CONFIGS = Path(__file__).parent.parent / "configs"
TEXT = """
model:
  hidden_size: 32
  layers:
    - {mixer: {type: sliding_attention, window: 16, num_heads: 2}, ffn: swiglu}
    - {mixer: attention, ffn: swiglu}
data:
  sources: [{type: stdlib}]
train:
  steps: 10
  learning_rate: 1e-3
  mixed_precision: no
  curriculum: [{length: 64, digits: [5, 30], until: .5}, {length: 128}]
presets:
  tiny:
    model: {layers: [{mixer: {window: 8}}, {}]}
    train: {steps: 5, curriculum: [{length: 32}]}
  books:
    data: {sources: [{type: text, files: [books]}]}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    return file


def test_file_becomes_typed_sections(path):
    config = load_config(path)
    assert config.name == "run"
    assert config.output_dir == Path("runs/run")
    assert config.model["hidden_size"] == 32
    assert config.train.learning_rate == 1e-3  # plain YAML reads a string
    assert config.train.mixed_precision == "no"  # plain YAML reads False
    assert config.train.curriculum == [
        Stage(length=64, digits=(5, 30), until=0.5),
        Stage(length=128),
    ]


def test_negative_numbers_are_values_not_keys():
    words = ["--train.learning_rate", "-1E2", "--train.steps", "-3"]
    assert parse_overrides(words) == {"train.learning_rate": -100.0, "train.steps": -3}


def test_preset_merges_lists_of_mappings_of_equal_length_and_replaces_others(path):
    config = load_config(path, preset="tiny")
    assert config.model["layers"][0]["mixer"] == {
        "type": "sliding_attention",
        "window": 8,
        "num_heads": 2,
    }
    assert config.model["layers"][1]["mixer"] == "attention"
    assert config.train.curriculum == [Stage(length=32)]
    assert config.train.learning_rate == 1e-3


def test_preset_with_another_type_replaces_the_mapping(path):
    assert load_config(path, preset="books").data.sources == [{"type": "text", "files": ["books"]}]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.steps", "20"], ("train", "steps", 20)),
        (["--train.steps=20"], ("train", "steps", 20)),
        (["--train.learning_rate", "1e-2"], ("train", "learning_rate", 0.01)),
        (["--train.learning_rate", "1E2"], ("train", "learning_rate", 100.0)),
        (["--train.learning_rate", "2"], ("train", "learning_rate", 2.0)),
        (["--train.betas", "[0.8, 0.9]"], ("train", "betas", (0.8, 0.9))),
        (["--train.micro_batch_rows", "null"], ("train", "micro_batch_rows", None)),
        (["--train.output_dir", "no"], ("train", "output_dir", "no")),
        (["--train.carry_state", "true"], ("train", "carry_state", True)),
        (["--train.loss_weights.answer", "1"], ("train", "loss_weights", {"answer": 1.0})),
        (["--data.tokenizer", "some/name"], ("data", "tokenizer", "some/name")),
    ],
)
def test_overrides(path, words, expected):
    section, name, value = expected
    found = getattr(getattr(load_config(path, words), section), name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_lists_and_beat_the_preset(path):
    words = [
        "--model.layers.0.mixer.window=4",
        "--train.curriculum.0.length",
        "16",
        "--model.layers.1.mixer",
        "sliding_attention",
    ]
    config = load_config(path, words, preset="tiny")
    assert config.model["layers"][0]["mixer"]["window"] == 4
    assert config.model["layers"][1]["mixer"] == "sliding_attention"
    assert config.train.curriculum[0].length == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stepz", "3"], "command line: unknown key 'train.stepz'; did you mean 'steps'?"),
        (["--train.gradient_checkpointing", "true"], "is now train.activations: recompute"),
        (["--tran.steps", "3"], "unknown key 'tran'; did you mean 'train'?"),
        (["--train.curriculum.0.lenth", "3"], "'train.curriculum.0.lenth'; did you mean 'length'?"),
        (["--model.hiden_size", "3"], "'hiden_size'; did you mean 'hidden_size'?"),
        (["--model.layers.0.mixer.windo", "3"], "model.layers.0.mixer: unknown key 'windo'"),
        (["--model.layers.0.memory", "titan"], "unknown memory 'titan'; did you mean 'titans'?"),
        (["--data.sources.0.type", "stdlb"], "unknown source type 'stdlb'; did you mean 'stdlib'?"),
        (["--evaluate.tasks", "[needl]"], "evaluate.tasks: unknown task 'needl'"),
        (["--train.steps", "many"], "command line: train.steps: expected int, got 'many'"),
        (["--train.steps", "null"], "train.steps: expected int, got None"),
        (["--train.steps", "1.5"], "train.steps: expected int, got 1.5"),
        (["--train.micro_batch_rows", "x"], "expected int or null, got 'x'"),
        (["--train.betas", "[1]"], "expected a list of 2 (float), got [1]"),
        (["--train.trackers", "wandb"], "expected a list (str), got 'wandb'"),
        (["--train.loss_weights.answer", "x"], "expected a mapping to float or null"),
        (["--train.loss_weights.answr", "1"], "unknown group 'answr'; did you mean 'answer'?"),
        (["--train.mixed_precision", "fp8"], "expected one of no, bf16, got 'fp8'"),
        (["--train.steps", "0"], "train.steps: must be at least 1, got 0"),
        (["--train.curriculum.0.until", "2"], "must grow to 1.0, got [2.0, 1.0]"),
        (["--train.curriculum.0.length", "100"], "8192 is not a multiple of the row length 100"),
        (["--train.curriculum.0", "{window: 3}"], "train.curriculum.0 needs 'length'"),
        (["--train.curriculum", "3"], "train.curriculum: expected a list, got 3"),
        (["--train.curriculum.5.length", "64"], "'5' is not a place in a list of 2"),
        (["--train.steps.x", "64"], "train.steps is 10, which has no 'x'"),
        (["--model.layers.0.ffn.x", "64"], "give model.layers.0.ffn as a mapping"),
        (["--train", "3"], "train: expected a mapping, got 3"),
        (["--model", "3"], "model: expected a mapping, got 3"),
        (["--train.steps"], "--train.steps: needs a value"),
        (["--train.steps", "--train.seed"], "--train.steps: needs a value"),
        (["steps"], "unexpected argument 'steps'"),
        (["--train.trackers", "[a"], "--train.trackers: not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(path, words, message):
    with pytest.raises(UserError) as caught:
        load_config(path, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_file_name_the_file(path):
    path.write_text(TEXT.replace("steps: 10", "steps: ten"))
    with pytest.raises(UserError) as caught:
        load_config(path, ["--train.seed", "1"])
    assert str(caught.value) == f"{path}: train.steps: expected int, got 'ten'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {steps: 1, steps: 2}", "line 1: the key 'steps' is given twice"),
        ("train: [1", "not valid YAML"),
        ("- 1", "needs the sections"),
        ("", "needs the sections"),
        (b"\xff\xfe\x00", "not a readable text file"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_missing_file_and_preset(path):
    with pytest.raises(UserError, match=r"rum\.yaml: no such config file; did you mean .*run\.ya"):
        load_config(path.with_name("rum.yaml"))
    with pytest.raises(UserError, match="no preset 'tyni'; did you mean 'tiny'"):
        load_config(path, preset="tyni")
    with pytest.raises(UserError, match="not a readable text file"):
        load_config(path.parent)


def test_saved_config_reads_back_the_same(path, tmp_path):
    config = load_config(path, ["--evaluate.tasks", "[needle]"], preset="tiny")
    (tmp_path / "again").mkdir()
    save_config(config, tmp_path / "again" / "run.yaml")
    assert load_config(tmp_path / "again" / "run.yaml") == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_load(file):
    config = load_config(file)
    assert isinstance(config, RunConfig)
    if file.stem not in ("demo", "titans_needle"):
        assert load_config(file, preset="tiny").train.steps <= 1000


def test_defaults_are_valid():
    assert TrainConfig().stages() == [Stage(length=1024)]


def test_command_line_exits_with_2_and_one_line(path, monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "train.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", str(path), "--train.stepz", "3"])
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    told = "error: command line: unknown key 'train.stepz'; did you mean 'steps'?\n"
    assert capsys.readouterr().err == told
