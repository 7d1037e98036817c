"""Two processes share an evaluation and write one result."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import NeedleOptions
from memlm.evaluation.ledger import read_records
from memlm.evaluation.main import main
from memlm.evaluation.processes import Processes

ROOT = Path(__file__).parents[2]


def launched(words: Sequence[str], folder: Path) -> str:
    """What eval.py prints where accelerate starts it twice."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    clean = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run(
        [*launch, "--num_processes", "2", str(ROOT / "eval.py"), *words],
        timeout=300,
        capture_output=True,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def forked(words: Sequence[str], folder: Path) -> str:
    """The same from two processes that import nothing anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.training.main"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"{rank}.txt" for rank in range(2)]
    processes = [
        context.Process(target=_evaluate, args=(rank, port, words, file))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return "".join(file.read_text() for file in files)


def _evaluate(rank: int, port: int, words: Sequence[str], file: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    with file.open("w") as told, contextlib.redirect_stdout(told):
        code = main(words)
    sys.exit(code)


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_processes_give_the_numbers_of_one(start, tiny_model, tokenizer, text_file, tmp_path):
    model = tiny_model(memory="gated_delta")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = f"--model {tmp_path / 'model'} --output {tmp_path / 'out'} --tasks needle"
    words += f" --lengths 150,300 --trials 6 --batch_size 2 --haystack {text_file}"
    words += " --needle.distance 45 --needle.depths 2"
    assert start(words.split(), tmp_path).count("Report: ") == 1
    keys = [found.batch.key for found in read_records(tmp_path / "out")]
    assert len(set(keys)) == len(keys) == 6
    files = sorted((tmp_path / "out" / "records").glob("*.jsonl"))
    assert [file.read_text().count("\n") for file in files] == [3, 3]
    config = EvaluationConfig(
        tasks=["needle"],
        lengths=[150, 300],
        trials=6,
        batch_size=2,
        haystack=[str(text_file)],
        needle=NeedleOptions(depths=2, distance=45),
    )
    alone = evaluate(model, tokenizer, config, progress=False)
    shared = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = (found["runs"][0]["tasks"]["needle"] for found in (alone, shared))
    assert first["scores"] == second["scores"] and first["failures"] == second["failures"]


def test_processes_that_do_not_find_each_other_are_noticed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes but 1 take part"):
        Processes()
