import pytest
import torch

from memlm.errors import UserError
from memlm.evaluation.suite.cell import run_cell
from memlm.evaluation.suite.cells import make_cells
from memlm.evaluation.suite.config import load_suite
from memlm.training.trainer import Trainer

TIMES = ("seconds", "evaluation_seconds")


def grid(path, *overrides):
    return make_cells(load_suite(path, None, overrides))


def numbers(found):
    return {key: value for key, value in found.items() if key not in TIMES}


def test_what_a_cell_keeps(suite_file, tmp_path, capfd):
    _, cell = grid(suite_file())
    found = run_cell(cell, tmp_path / "runs" / "one")
    assert list(found)[:6] == ["key", "task", "memory", "width", "learning_rate", "seed"]
    assert found["key"] == "parity_gated_delta_w8_lr0.003_s0"
    # Those of the model that was trained; the grid has them of one without weights.
    assert found["parameters"] == cell.parameters > 0
    assert found["flops_per_token"] == cell.flops_per_token > 0
    # A head of 8 keys and 16 values and three positions of 8 + 8 + 16 convolved channels, in fp32.
    assert found["memory_state_bytes"] == {"6": 4 * (8 * 16 + 3 * 32), "12": 4 * (8 * 16 + 3 * 32)}
    assert found["state_bytes"].keys() == found["memory_state_bytes"].keys()
    scores = found["scores"]["parity"]
    assert list(scores) == ["6", "12"]
    assert all(0 <= one["on"] <= 1 for one in scores.values())
    # 8 rows of 6 answers each.
    assert scores["6"]["on"] * 48 == pytest.approx(round(scores["6"]["on"] * 48))
    assert 0 < found["held_out"]["answer_bits"] < 3
    assert (found["steps"], found["error"]) == (8, None)
    # What the run says is in a file, and nothing is drawn.
    assert capfd.readouterr() == ("", "")
    assert "step 8/8" in (tmp_path / "runs" / "one.log").read_text()
    assert not (tmp_path / "runs" / "one" / "training.png").exists()


def test_numbers_depend_on_the_cell_alone(suite_file, tmp_path, monkeypatch):
    first, second = grid(suite_file(), "--base.train.save_every", "3")
    rough, _ = grid(suite_file(), "--base.train.mixed_precision", "bf16")
    torch.manual_seed(1)
    alone = run_cell(second, tmp_path / "alone")
    run_cell(rough, tmp_path / "rough")
    torch.manual_seed(2)
    assert numbers(run_cell(second, tmp_path / "after")) == numbers(alone)
    assert run_cell(first, tmp_path / "first")["held_out"] != alone["held_out"]

    # Killed before its fifth step it goes on from the third; before a checkpoint it starts anew.
    steps, done = Trainer._one_step, []

    def one_step(trainer):
        done.append(trainer.step)
        if len(done) == last:
            raise KeyboardInterrupt
        return steps(trainer)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    for last, repeated in ((5, [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]), (2, [0, 1, *range(8)])):
        done.clear()
        folder = tmp_path / f"killed{last}"
        with pytest.raises(KeyboardInterrupt):
            run_cell(second, folder)
        assert numbers(run_cell(second, folder)) == numbers(alone)
        assert done == repeated


def test_a_training_that_diverges_is_a_result(suite_file, tmp_path):
    path = suite_file(base__train__max_skipped_steps=0)
    cell, _ = grid(path, "--learning_rates", "[1e18]", "--base.train.clip_norm", "0")
    found = run_cell(cell, tmp_path / "run")
    assert "gradient norm" in found["error"] and "\n" not in found["error"]
    assert (found["scores"], found["held_out"]) == ({}, {})
    assert 0 < found["steps"] < 8


def test_want_of_memory_is_a_result_and_a_mistake_is_none(suite_file, tmp_path, monkeypatch):
    cell, _ = grid(suite_file())

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("memlm.evaluation.tasks.synthetic.Synthetic.run", no_memory)
    found = run_cell(cell, tmp_path / "evaluated")
    assert (found["error"], found["steps"]) == ("no memory left on the device", 8)
    monkeypatch.setattr(Trainer, "_one_step", no_memory)
    found = run_cell(cell, tmp_path / "trained")
    assert (found["error"], found["steps"]) == ("no memory left on the device", 0)

    long, _ = grid(suite_file(base__data__sources=[{"type": "parity", "lengths": [4, 99]}]))
    with pytest.raises(UserError, match="99"):
        run_cell(long, tmp_path / "long")
