"""What a run folder says about how the run was started."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import memlm
from memlm.config import save_config
from memlm.errors import UserError
from memlm.training import provenance
from memlm.training.main import main
from memlm.training.provenance import (
    STARTS_FILE,
    describe_code,
    describe_start,
    read_starts,
    record_start,
)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package in a git checkout."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_revision_of_the_code_and_whether_it_was_changed(package):
    revision = git(package, "rev-parse", "HEAD")
    (package.parent / "notes.txt").write_text("no code")
    assert describe_code(package) == {"revision": revision, "dirty": False}
    (package / "new.py").write_text("")
    assert describe_code(package) == {"revision": revision, "dirty": True}
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("changed")
    assert describe_code(package) == {"revision": revision, "dirty": True}


def test_no_revision_without_a_checkout_of_the_code_or_without_git(package, tmp_path, monkeypatch):
    # As pip installs it into an environment that lies in the checkout of something else.
    installed = package.parent / "environment" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert describe_code(installed) is None
    assert describe_code(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_code(package) is None


def test_every_start_is_added_and_none_is_lost(make_config, tmp_path, capsys):
    config = make_config(steps=2, save_every=1)
    save_config(config, tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml")]
    assert main([*words, "--train.steps=1"]) == 0
    (first,) = read_starts(config.output_dir)
    assert first["from"] is None
    assert first["command"] == shlex.join([sys.executable, *sys.orig_argv[1:]])
    assert first["directory"] == os.getcwd()
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["memlm"] == memlm.__version__
    assert [one["device"] for one in first["processes"]] == ["cpu"]
    assert first["processes"][0]["host"] == first["host"] == os.uname().nodename
    assert time.strptime(first["time"], "%Y-%m-%dT%H:%M:%SZ")

    assert main([*words, "--resume"]) == 0
    starts = read_starts(config.output_dir)
    assert starts[0] == first
    assert [start["from"] for start in starts] == [
        None,
        str(config.output_dir / "checkpoints" / "step_000001"),
    ]
    assert main(words) == 2  # in use: no start
    assert read_starts(config.output_dir) == starts


def test_the_environment_of_launchers_and_no_secrets(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("ACCELERATE_API_KEY", "MEMLM_TOKEN", "WANDB_API_KEY", "HOME_OF_MINE"):
        monkeypatch.setenv(name, "hidden")
    start = describe_start()
    assert start["environment"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert start["environment"]["WORLD_SIZE"] == "4"
    assert "hidden" not in json.dumps(start)


def test_a_start_is_described_in_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "describe_code", lambda _: None)
    accelerator, seconds = Accelerator(cpu=True), []
    for _ in range(5):
        began = time.process_time()
        record_start(accelerator, tmp_path, None)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05


@pytest.mark.parametrize("content", ["{", "{}", "[3]", "\0"])
def test_a_damaged_record_is_not_written_over(tmp_path, content):
    (tmp_path / STARTS_FILE).write_text(content)
    with pytest.raises(UserError, match=r"run\.json: not the list of a run's starts"):
        record_start(Accelerator(cpu=True), tmp_path, None)
    assert (tmp_path / STARTS_FILE).read_text() == content
