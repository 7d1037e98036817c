"""Two trainings never write into one run folder."""

import os
import signal

import pytest
from accelerate import Accelerator

from memlm.config import save_config
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig
from memlm.training import Trainer
from memlm.training import main as command
from memlm.training.run_lock import LOCK_FILE, RunLock


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_held_until_the_evaluation_after_the_run_is_done(
    make_config, tmp_path, monkeypatch, capsys
):
    config = make_config(steps=1)
    config.evaluate = EvaluationConfig(tasks=["needle"])
    save_config(config, tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml")]
    run, moments = Trainer.run, []

    def attempt(moment: str) -> None:
        before = contents(config.output_dir)
        for resume in ([], ["--resume"], ["--resume", "auto"]):
            capsys.readouterr()
            assert command.main([*words, *resume]) == 2
            assert capsys.readouterr().err == (
                f"error: {config.output_dir}: another training is at work here (process "
                f"{os.getpid()} on {os.uname().nodename}); wait for its end, or choose another "
                "folder with --train.output_dir\n"
            )
        assert contents(config.output_dir) == before
        moments.append(moment)

    def run_and_attempt(self, interruption):
        attempt("start")
        return run(self, interruption)

    monkeypatch.setattr(Trainer, "run", run_and_attempt)
    monkeypatch.setattr(command, "_evaluate", lambda _: attempt("evaluation"))
    assert command.main(words) == 0
    assert moments == ["start", "evaluation"]
    assert not (config.output_dir / LOCK_FILE).exists()


def test_a_killed_holder_is_not_in_the_way(tmp_path):
    accelerator, folder = Accelerator(cpu=True), tmp_path / "run"
    child = os.fork()
    if child == 0:
        try:
            RunLock(folder, accelerator).__enter__()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert str(child) in (folder / LOCK_FILE).read_text()
    with RunLock(folder, accelerator):
        assert str(os.getpid()) in (folder / LOCK_FILE).read_text()
    assert folder.exists()  # it was there


def test_what_was_made_for_the_lock_alone_goes_with_it(tmp_path):
    accelerator, folder = Accelerator(cpu=True), tmp_path / "runs" / "one"
    with RunLock(folder, accelerator), pytest.raises(UserError, match="another training is at"):
        RunLock(folder, accelerator).__enter__()
    assert not folder.parent.exists()
    with RunLock(folder, accelerator):
        (folder / "kept").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["kept"]
