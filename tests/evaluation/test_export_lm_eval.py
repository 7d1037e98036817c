"""lm-evaluation-harness gives a trained model the scores of eval.py on the same trials."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memlm.evaluation.export.__main__ import main as export
from memlm.evaluation.ledger import read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm_eval is not installed (pip install 'lm_eval[hf]')",
    ),
]

TRIALS = 16
CONFIG = {
    "model": {
        "hidden_size": 128,
        "layers": [
            {
                "repeat": 2,
                "mixer": {
                    "type": "sliding_attention",
                    "window": 320,
                    "num_heads": 2,
                    "rope": False,
                    "conv_size": 4,
                },
                "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 32},
                "ffn": {"type": "swiglu", "intermediate_size": 176},
            }
        ],
    },
    "data": {
        "tokenizer": "bytes",
        "sources": [{"type": "passkey", "digits": [5, 30], "queries": [1, 3]}],
    },
    "train": {
        "steps": 260,
        "tokens_per_step": 4096,
        "length": 256,
        "loss_weights": {"text": 0.2, "answer": 1.0},
        "optimizer": "muon",
        "muon_learning_rate": 5e-3,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "warmup_steps": 50,
    },
}


def start(folder: Path, main: str, *words: str) -> None:
    """Run `main` of a module, such as memlm.training.main:main, in `folder`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    module, function = main.split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    command = [sys.executable, "-c", code, *words]
    subprocess.run(command, cwd=folder, check=True, timeout=1500, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that recalls some pass keys, evaluated, exported and judged by the harness.

    The documents of `nq` hold pass keys too: a task that a function of the export scores.
    """
    root = tmp_path_factory.mktemp("harness")
    keys = [f"{7919 * number % 90_000 + 10_000}" for number in range(1, TRIALS + 1)]
    rows = [
        {
            "context": f"import {key[:2]}\n# The pass key is {key}.\nreturn None\n",
            "question": "# The pass key is",
            "answers": [key, "no such key"],
        }
        for key in keys
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    start(root, "memlm.training.main:main", "--config", "config.yaml", "--train.output_dir", "run")
    options = (
        f"--tasks needle,passkey,nq --lengths 288,384 --trials {TRIALS} --needle.distance 60 "
        f"--recall_completion.nq {root / 'rows.json'}"
    ).split()
    words = ["--model", "run", "--conditions", "on", "--output", "ours"]
    start(root, "memlm.evaluation.main:main", *options, *words)
    assert (
        export([*options, "--tokenizer", str(root / "run"), "--output", str(root / "tasks")]) == 0
    )
    start(
        root,
        *("lm_eval.__main__:cli_evaluate", "--model", "hf", "--device", "cpu", "--batch_size", "5"),
        *("--model_args", "pretrained=run,trust_remote_code=True,max_length=384"),
        *("--include_path", "tasks", "--tasks", "memlm", "--output_path", "theirs"),
        "--log_samples",
    )
    return root


def test_every_answer_and_score_is_that_of_the_evaluation(folder: Path) -> None:
    ours = {
        (done.batch.task, record.setting, record.trial, number): answer
        for done in read_records(folder / "ours")
        for record in done.records
        for number, answer in enumerate(record.answers)
    }
    scores: dict[str, list[float]] = {}
    compared = 0
    for task in ("needle", "passkey", "nq"):
        for length in ("288", "384"):
            (file,) = (folder / "theirs").rglob(f"samples_memlm_{task}_{length}_*.jsonl")
            for line in file.read_text().splitlines():
                sample = json.loads(line)
                document = sample["doc"]
                answer = ours[task, length, document["trial"], document["question"]]
                score = sample["score" if task == "nq" else "exact_match"]
                # The harness leaves off what follows the end of an answer.
                ends = answer["prediction"].partition("\n" if task == "nq" else "\0")
                assert sample["resps"][0][0] == ends[0]
                assert score == answer["score"]
                scores.setdefault(task, []).append(score)
                compared += 1
    assert compared == len(ours) == 6 * TRIALS
    # A model that recalls nothing would show nothing.
    assert 0.2 < sum(scores["needle"]) / len(scores["needle"]) <= 1.0
    assert 0.2 < sum(scores["nq"]) / len(scores["nq"]) <= 1.0


def test_the_means_are_those_of_the_evaluation(folder: Path) -> None:
    results = json.loads((folder / "ours" / "results.json").read_text())
    (file,) = (folder / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    (run,) = results["runs"]
    for task in ("needle", "passkey", "nq"):
        for length in ("288", "384"):
            metric = "score,none" if task == "nq" else "exact_match,answer"
            mean = run["tasks"][task]["scores"][length]["on"]["value"]
            assert theirs[f"memlm_{task}_{length}"][metric] == pytest.approx(mean)
