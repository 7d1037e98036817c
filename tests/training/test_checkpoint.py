"""Checkpoints that are damaged, kept, replaced, and resumed on other numbers of processes."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memlm.config import Stage, save_config
from memlm.errors import UserError
from memlm.files import append_line
from memlm.training import Trainer, trainer
from memlm.training.checkpoint import find_checkpoint, write_checkpoint
from memlm.training.feed import RowFeed
from memlm.training.logs import METRICS_FILE, RunLog, read_metrics
from memlm.training.main import main
from memlm.training.manifest import MANIFEST_FILE, check_manifest, write_manifest
from memlm.training.retention import (
    checkpoint_path,
    complete_checkpoints,
    keep_latest,
    set_aside_later,
)
from memlm.training.sharded import write_parts
from tests.training.launching import ROOT, Job, dropped_out, save_base, train_in_two
from tests.training.test_trainer import losses

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(run: Path, *steps: int) -> list[Path]:
    """Checkpoints that hold next to nothing."""

    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100))

    for step in steps:
        write_checkpoint(checkpoint_path(run, step), write)
    return [checkpoint_path(run, step) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = [
    (truncate, "model.safetensors: damaged: 99 bytes where 100 were written"),
    (flip, "model.safetensors: damaged: its content changed"),
    (Path.unlink, "model.safetensors: missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(
    tmp_path, capsys, damage, message
):
    older, newer = save(tmp_path, 2, 10)
    assert find_checkpoint(None, tmp_path) == newer
    damage(newer / "model.safetensors")
    with pytest.raises(UserError, match=message):
        find_checkpoint(newer, tmp_path)
    assert find_checkpoint(None, tmp_path) == find_checkpoint(tmp_path, Path("other")) == older
    (warning, _) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {newer} is passed over: {newer / message.split(':')[0]}")
    damage(older / "model.safetensors")
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        find_checkpoint(None, tmp_path)


def test_what_another_run_is_writing_stays(tmp_path):
    (newest,) = save(tmp_path, 2)
    begun = newest.with_name(".step_000004.partial")
    begun.mkdir()
    assert find_checkpoint(tmp_path, Path("other")) == newest
    assert begun.is_dir()
    assert find_checkpoint(None, tmp_path) == newest
    assert not begun.exists()


def test_a_flipped_bit_is_noticed_in_the_manifest_as_well(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"0123")
    write_manifest(tmp_path)
    check_manifest(tmp_path)
    (tmp_path / "notes.txt").write_text("a user's own")
    check_manifest(tmp_path)
    for path in (tmp_path / "a" / "b", tmp_path / MANIFEST_FILE):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 7):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(UserError):
                check_manifest(tmp_path)
        path.write_bytes(whole)
    check_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="manifest.json: missing"):
        check_manifest(tmp_path)


def test_the_latest_stay_and_those_at_multiples_for_ever(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step)
        keep_latest(tmp_path, 2, every=4)
    (tmp_path / "checkpoints" / "step_mine").mkdir()  # nobody else's business
    keep_latest(tmp_path, 2, every=4)
    assert names(tmp_path / "checkpoints") == [
        *("step_000004", "step_000008", "step_000009", "step_000010", "step_mine")
    ]
    keep_latest(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000010"]
    save(tmp_path, 999_999, 1_000_000)  # by number, not by name
    keep_latest(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_1000000"]


def test_checkpoints_that_a_run_repeats_are_set_aside(tmp_path):
    save(tmp_path, 2, 4, 6)
    for _ in range(2):
        set_aside_later(tmp_path, 2)
        assert names(tmp_path / "checkpoints") == [
            *("step_000002", "step_000004.superseded", "step_000006.superseded")
        ]
        save(tmp_path, 4, 6)


def test_auto_starts_goes_on_and_ends_like_a_run_in_one_piece(make_config, tmp_path, capsys):
    options = {"steps": 6, "save_every": 1, "keep_checkpoints": 2, "keep_every": 3}
    whole, auto = make_config("whole", **options), make_config("auto", **options)
    Trainer(whole).run()
    save_config(auto, tmp_path / "auto.yaml")
    words = ["--config", str(tmp_path / "auto.yaml"), "--resume", "auto"]
    assert main(words) == 0
    folder = auto.output_dir / "checkpoints"
    assert names(folder) == ["step_000003", "step_000005", "step_000006"]
    flip(folder / "step_000006" / "optimizer.safetensors")
    with (auto.output_dir / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "lo')
    capsys.readouterr()
    assert main(words) == 0
    printed = capsys.readouterr()
    assert f"warning: {folder / 'step_000006'} is passed over" in printed.err
    assert "from step 5" in printed.out
    assert losses(auto) == losses(whole)
    weights = [load_file(c.output_dir / "model.safetensors") for c in (whole, auto)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    # Killed before the first checkpoint: there is nothing to go on from, and nothing to lose.
    shutil.rmtree(folder)
    assert main(words) == 2  # but here is a model
    (auto.output_dir / "model.safetensors").unlink()
    assert main(words) == 0
    assert losses(auto) == losses(whole)

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main([*words, f"--train.output_dir={other}"]) == 2
    assert "the run folder is not empty" in capsys.readouterr().err
    assert names(other) == ["thesis.txt"]
    (other / "thesis.txt").rename(other / "config.yaml")  # of a user, who starts the run from it
    assert main([*words, f"--train.output_dir={other}"]) == 2
    assert (other / "config.yaml").read_text() == "mine"


def test_a_half_record_is_dropped_and_a_broken_one_named(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "name": "\xc3')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    RunLog(tmp_path, steps=9, step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for broken in ("nonsense", "[3]", '{"step": "2"}'):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(UserError, match="line 2 is no record"):
            read_metrics(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(["mount", *options]).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_ends_a_run_with_its_last_checkpoint_whole(
    make_config, tmp_path, small_disk, monkeypatch, capsys
):
    config = make_config("disk/run", steps=6, save_every=2, log_every=100)
    save_config(config, tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml"), "--resume", "auto"]
    one_step = Trainer._one_step

    def until_full(self):
        if self.step == 3:
            fill(small_disk)
        return one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", until_full)
    assert main(words) == 2
    folder = config.output_dir / "checkpoints"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder / 'step_000004'}: could not be written (No space left")
    assert names(folder) == ["step_000002"]
    check_manifest(folder / "step_000002")

    (small_disk / "filler").unlink()
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    assert main(words) == 0
    assert "from step 2" in capsys.readouterr().out
    assert names(folder) == ["step_000004", "step_000006"]


def test_a_full_disk_leaves_whole_checkpoints_of_sharded_weights(make_config, small_disk):
    options = {"steps": 40, "save_every": 1, "keep_checkpoints": 40, "log_every": 100}
    config = make_config("disk/run", **options)
    full = r"checkpoints/.*step_\d+.*: could not be written \(No space left on device\)"
    (small_disk / "filler").write_bytes(bytes(600_000))
    with pytest.raises(AssertionError, match=full):
        train_in_two(Job(config, sharded=True))
    found = complete_checkpoints(config.output_dir)
    assert names(config.output_dir / "checkpoints") == [path.name for path in found] != []
    for path in found:
        check_manifest(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_disk_that_fills_up_in_the_middle_of_a_part_is_named(small_disk):
    tensors = {"weights": {name: torch.zeros(200_000) for name in ("one", "two")}}
    with pytest.raises(UserError, match=r"disk: could not be written \(No space left"):
        write_parts(small_disk, tensors)


def test_a_full_disk_leaves_no_part_of_a_record(small_disk):
    path = small_disk / METRICS_FILE
    append_line(path, json.dumps({"step": 1}))
    fill(small_disk)
    with pytest.raises(UserError, match=r"metrics.jsonl: could not be written \(No space left"):
        append_line(path, json.dumps({"step": 2, "long": "x" * 10_000}))
    assert path.read_text() == '{"step": 1}\n'


def test_a_full_disk_elsewhere_is_no_traceback(make_config, tmp_path, monkeypatch, capsys):
    def plot(*_):
        raise FULL

    monkeypatch.setattr(Trainer, "_plot", plot)
    save_config(make_config(steps=1), tmp_path / "run.yaml")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "No space left on device; what was saved before is whole" in capsys.readouterr().err


def test_resume_is_exact_in_losses_gradients_weights_and_states_under_dropout(
    make_config, tmp_path, monkeypatch
):
    base = save_base(tmp_path / "base")
    gradients: list[list[torch.Tensor | None]] = []
    clip = trainer.clip_gradients

    def noted(parameters, *rest):
        parameters = list(parameters)
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        return clip(parameters, *rest)

    monkeypatch.setattr(trainer, "clip_gradients", noted)
    stages = [Stage(length=32, until=0.5), Stage(length=64)]
    options = {"steps": 8, "curriculum": stages, "carry_state": True, "micro_batch_rows": 2}
    options |= {"save_every": 1, "keep_checkpoints": 8}
    whole = dropped_out(make_config, base, "whole", **options)
    Trainer(whole).run()
    expected = gradients.copy()
    assert len(expected) == 8
    for step in (3, 6):
        gradients.clear()
        again = dropped_out(make_config, base, f"again{step}", **options)
        again.output_dir.mkdir()
        place = checkpoint_path(whole.output_dir, step)
        Trainer(again, resume=place).run()
        assert losses(again) == losses(whole)[step:]
        for mine, theirs in zip(gradients, expected[step:], strict=True):
            assert sum(one is not None for one in mine) > 5
            for one, two in zip(mine, theirs, strict=True):
                assert (one is None and two is None) or torch.equal(one, two)
        for file in ("memory", "optimizer", "memory_states"):  # the weights, and what else is kept
            ends = [
                load_file(checkpoint_path(c.output_dir, 8) / f"{file}.safetensors")
                for c in (whole, again)
            ]
            assert ends[0].keys() == ends[1].keys()
            assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), file
    # And dropout did something: other random numbers, other gradients.
    other = dropped_out(make_config, base, "other", **options)
    monkeypatch.setattr(Trainer, "_seed", lambda self: torch.manual_seed(99))
    Trainer(other, resume=checkpoint_path(whole.output_dir, 7)).run()
    assert losses(other) != losses(whole)[7:]


def test_no_random_number_comes_from_a_generator_that_others_use(make_config, tmp_path):
    base = save_base(tmp_path / "base")
    config = dropped_out(make_config, base, "run", steps=2, evaluation_rows=4)
    before = random.getstate(), np.random.get_state()[1].copy()
    Trainer(config).run()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_random_numbers_and_rows_of_a_process(make_config):
    run = Trainer(make_config())
    drawn = set()
    for process in (0, 1):
        run.accelerator = type("", (), {"process_index": process})
        for _ in range(2):
            run._seed()
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 2
    for step in (0, 5):
        parts = [RowFeed(run.dataset, 4, process, 2) for process in (0, 1)]
        rows = torch.cat([part.get(step)["input_ids"] for part in parts])
        assert torch.equal(rows, run.feed.get(step)["input_ids"])
        for part in parts:
            part.close()
    run.feed.close()


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_all_processes(make_config, tmp_path):
    config = make_config(steps=2)
    Trainer(config).run()
    flip(checkpoint_path(config.output_dir, 2) / "model.safetensors")
    save_config(config, tmp_path / "run.yaml")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(ROOT / "train.py")),
            *("--config", str(tmp_path / "run.yaml"), "--resume", "auto"),
        ],
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode
    assert "none of its 1 checkpoints is whole" in done.stderr
