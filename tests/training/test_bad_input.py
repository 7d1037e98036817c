"""Bad input of every kind: exit code 2, one line that says what, where and what would be valid."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from memlm.training.main import main
from tests.training import bad_configs, bad_files
from tests.training.bad_files import NEWEST, RESUME, SHARDS
from tests.training.bad_input import CONFIG

CASES = [*bad_configs.CASES, *bad_files.CASES]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with texts, a config, a trained run and its shards."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "run.yaml").write_text(CONFIG)
    rng = random.Random(0)
    (folder / "corpus").mkdir()
    for number in range(8):
        text = " ".join(rng.choice(["memory", "reads", "the", "state"]) for _ in range(60))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["--config", "run.yaml", "--train.output_dir=run", *SHARDS]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(words, capsys, folder: Path) -> str:
    """The line that training ends with; nothing in the folder may have changed."""
    before = contents(folder)
    assert main(["--config", "run.yaml", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    (line,) = [line for line in lines if line not in warnings]
    assert line.startswith("error: ")
    assert contents(folder) == before
    return line


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of what was prepared, and the working directory."""
    place = tmp_path / "case"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(("words", "expected", "make"), CASES)
def test_bad_input_is_refused_in_one_line(folder, capsys, words, expected, make):
    make()
    capsys.readouterr()
    line = refused(words, capsys, folder)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "asked for 2 processes but 1 take part"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes but only one was started",
        ),
    ],
)
def test_processes_that_are_missing_end_a_run(folder, capsys, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refused([], capsys, folder)
    assert expected in line and "ACCELERATE_USE_CPU=true" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train.output_dir=disk/run", "disk/run"),
        ("--data.shards=disk/shards", "data.shards: disk/shards"),
    ],
)
def test_a_full_disk_ends_a_run(folder, capsys, words, expected):
    disk = folder / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(["mount", *options]).returncode:
        pytest.skip("may not mount a file system")
    try:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = contents(folder)
        assert main(["--config", "run.yaml", words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
        assert os.strerror(errno.ENOSPC) in line
        assert before.items() <= contents(folder).items()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_warm_up_longer_than_the_run_is_no_mistake(folder, capsys):
    assert main(["--config", "run.yaml", "--train.warmup_steps=9"]) == 0


@pytest.mark.parametrize("words", [[], ["--config"], ["--config", "run.yaml", "--preset"]])
def test_a_command_line_without_its_values_is_refused_in_one_line(capsys, words):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: command line: ")
    assert "--config" in line or "--preset" in line


def test_a_run_that_goes_on_with_other_rows_warns_of_it(folder, capsys):
    words = ["--config", "run.yaml", *RESUME, "--train.steps=3"]
    assert main([*words, "--train.tokens_per_step=128", "--data.seed=7"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert warnings == [
        f"warning: data.seed is 7, but {NEWEST} was trained with 0: rows may come twice or never",
        f"warning: train.tokens_per_step is 128, but {NEWEST} was trained with 64: rows may come "
        "twice or never",
    ]
    assert main([*words, "--train.tokens_per_step=128", "--data.seed=7"]) == 0
    assert "warning: " not in capsys.readouterr().err
