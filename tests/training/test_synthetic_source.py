"""A synthetic task from the command line: trained on, saved, and evaluated from its folder."""

import json

import pytest
import torch
import yaml

from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.loading import load_subject
from memlm.evaluation.main import parse_arguments
from memlm.evaluation.runner import evaluate_subjects
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.main import main

MIXER = {"type": "sliding_attention", "window": 16, "num_heads": 2, "conv_size": 4}


@pytest.fixture
def config_file(tmp_path):
    """`config_file(source)`: the path of a run that learns induction of three tokens."""

    def write(**source):
        config = {
            "model": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "layers": [{"repeat": 2, "mixer": MIXER, "ffn": "swiglu"}],
            },
            "data": {
                "tokenizer": "integers:4",
                "sources": [{"type": "induction", "tokens": 4, "lengths": [4, 8]} | source],
            },
            "train": {
                "steps": 60,
                "length": 32,
                "tokens_per_step": 512,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "evaluation_rows": 32,
                "save_every": 0,
                "output_dir": str(tmp_path / "run"),
            },
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def test_a_task_is_learned_and_found_again(config_file, tmp_path):
    assert main(["--config", str(config_file())]) == 0
    first, *_, last = (
        record
        for record in read_metrics(tmp_path / "run" / METRICS_FILE)
        if record.get("evaluation")
    )
    # Guessing one of three followers costs 1.58 bits.
    assert first["answer_bits"] > 1.58
    assert last["answer_bits"] < 0.5
    assert last["bits"] == last["answer_bits"]

    options = json.dumps({"induction": {"tokens": 4}})
    words = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    words += ["--tasks", "induction", "--synthetic.lengths", "5,8", "--synthetic.rows", "40"]
    given, config = parse_arguments([*words, "--synthetic.options", options])
    assert isinstance(config, EvaluationConfig)
    config.validate()
    subject = load_subject(given["model"][0], None, config, torch.device("cpu"))
    assert len(subject.tokenizer) == 8
    results = evaluate_subjects([subject], config, None, progress=False)
    task = results["runs"][0]["tasks"]["induction"]
    assert list(task["scores"]) == ["5", "8"]
    for scores in task["scores"].values():
        assert scores["on"]["value"] > 0.85


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"token": 4}, "data.sources[0] (induction): unknown key 'token'; did you mean 'tokens'?"),
        ({"lengths": [4, 64]}, "lengths: [4, 64] do not fit rows of 32 tokens"),
        ({"tokens": 9}, "Induction heads needs 9 token ids, the tokenizer has 8"),
    ],
)
def test_mistakes_are_one_line(config_file, source, message, capsys):
    assert main(["--config", str(config_file(**source))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
