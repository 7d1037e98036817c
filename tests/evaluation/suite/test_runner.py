import json
import re
import subprocess
from pathlib import Path

import pytest

from memlm.errors import UserError
from memlm.evaluation.suite.cells import make_cells
from memlm.evaluation.suite.config import load_suite
from memlm.evaluation.suite.identity import code_revision
from memlm.evaluation.suite.main import main
from memlm.evaluation.suite.runner import run_suite
from memlm.evaluation.suite.workers import Outcome
from memlm.files import try_lock


def fake_cell(cell, folder, plot):
    """A finished cell without training."""
    (folder / "checkpoints").mkdir(parents=True)
    score = (len(cell.memory) + cell.seed) / 20
    return cell.place | {
        "key": cell.key,
        "parameters": 1,
        "flops_per_token": 1,
        "state_bytes": {"6": 4},
        "memory_state_bytes": {"6": 4},
        "scores": {"parity": {"6": {"on": score}, "12": {"on": score / 2}}},
        "measures": {},
        "held_out": {"answer_bits": score},
        "steps": 8,
        "seconds": 1.0,
        "evaluation_seconds": 0.5,
        "error": None,
    }


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than all the rest; test_reports.py has them drawn."""
    monkeypatch.setattr("memlm.evaluation.suite.reports.draw_plot", lambda results: b"a picture")


@pytest.fixture
def suite(suite_file, tmp_path, monkeypatch):
    """`suite(work, *overrides)`: runs one of four cells into tmp_path/out."""
    monkeypatch.setattr("memlm.evaluation.suite.runner.run_cell", fake_cell)
    path = suite_file(seeds=[0, 1])

    def run(work, *overrides, folder="out", **options):
        config = load_suite(path, None, overrides)
        return run_suite(config, make_cells(config), tmp_path / folder, work, "repeat", **options)

    return run


def test_a_suite_that_was_stopped_goes_on_and_ends_like_one_that_was_not(
    suite, here, tmp_path, capsys
):
    whole, missing = suite(here(), folder="whole")
    assert missing == [] == whole["missing"]
    said = capsys.readouterr().err.splitlines()
    assert said[1].startswith(
        "[2/4] parity_gated_delta_w8_lr0.003_s1: parity 6: 0.600, 12: 0.300 ("
    )

    with pytest.raises(KeyboardInterrupt):
        suite(here(stop=2))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"suite.json", "cells", ".lock"}
    # Killed when a cell was written and its run folder was there.
    left = tmp_path / "out" / "runs" / "parity_gated_delta_w8_lr0.003_s0"
    left.mkdir(parents=True)
    again = here()
    results, _ = suite(again)
    assert not left.parent.exists()
    # The longest ones come first, and those that are done not again.
    assert again.jobs == ["parity_attention_w8_lr0.003_s0", "parity_attention_w8_lr0.003_s1"]
    assert results == whole
    for name in ("table.md", "plot.png", "results.json"):
        found = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "out")]
        assert found[0] == found[1]
    assert json.loads(found[0]) == json.loads(json.dumps(whole))
    assert [cell["key"][-2:] for cell in whole["cells"]] == ["s0", "s1"] * 2
    assert [point["memory"] for point in whole["points"]] == ["attention", "gated_delta"]
    assert (whole["seconds"], whole["machine"]["processes"]) == (6.0, 1)


def test_a_file_that_is_not_the_cell_is_told_and_left_alone(suite, here, tmp_path):
    suite(here())
    cells = tmp_path / "out" / "cells"
    path, other = (cells / f"parity_attention_w8_lr0.003_s{seed}.json" for seed in (0, 1))
    whole = json.loads(path.read_text())
    parts = [{key: value for key, value in whole.items() if key != gone} for gone in whole]
    for content in ("{", "null", "[]", "{}", *map(json.dumps, parts)):
        path.write_text(content)
        with pytest.raises(UserError, match=r"s0\.json: (not a cell of a suite|holds the cell)"):
            suite(here())
        assert path.read_text() == content
    # Counted as this seed it would narrow the range.
    path.write_bytes(other.read_bytes())
    with pytest.raises(
        UserError, match=r"s0\.json: holds the cell 'parity_attention_w8_lr0\.003_s1'"
    ):
        suite(here())


def test_code_of_another_revision_is_told(suite, here, tmp_path, monkeypatch, capsys):
    revision = "memlm.evaluation.suite.runner.code_revision"
    monkeypatch.setattr(revision, lambda: "abc")
    assert suite(here())[0]["revisions"] == ["abc"]
    suite(here())
    assert "revisions" not in capsys.readouterr().err
    monkeypatch.setattr(revision, lambda: "def+")
    assert suite(here())[0]["revisions"] == ["abc", "def+"]
    assert "several revisions has worked here (abc, def+)" in capsys.readouterr().err
    # A folder that is older than this note.
    identity = tmp_path / "out" / "suite.json"
    there = json.loads(identity.read_text())
    del there["revisions"]
    identity.write_text(json.dumps(there))
    assert suite(here())[0]["revisions"] == [None, "def+"]


def test_the_revision_is_that_of_the_package_alone(tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    assert code_revision(package) is None
    git("init")
    (package / "code.py").write_text("1")
    assert code_revision(package) is None
    git("add", ".")
    git("commit", "-m", "code")
    first = code_revision(package)
    assert re.fullmatch("[0-9a-f]{12}", first)
    (tmp_path / "text").write_text("1")
    git("add", ".")
    git("commit", "-m", "text")
    assert code_revision(package) == first
    (package / "code.py").write_text("2")
    assert code_revision(package) == f"{first}+"
    git("commit", "-am", "more code")
    assert code_revision(package) not in (first, f"{first}+")


def test_run_folders_stay_where_that_is_wanted(suite, here, tmp_path):
    suite(here(), keep_runs=True)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4


def test_a_folder_holds_one_suite_with_one_setting_each(suite, here, tmp_path):
    suite(here())
    told = r"parity_attention_w8_lr0\.003_s0\.train\.steps is 8, now it is 9; choose another folder"
    with pytest.raises(UserError, match=told):
        suite(here(), "--base.train.steps", "9")
    # It may grow, and have another title.
    more = here()
    results, _ = suite(more, "--seeds", "[0, 2]", "--title", "Other")
    assert {name[-2:] for name in more.jobs} == {"s2"}
    assert {cell["seed"] for cell in results["cells"]} == {0, 2}
    with pytest.raises(UserError, match=r"s1\.train\.steps is 8"):
        suite(here(), "--seeds", "[1]", "--base.train.steps", "9")

    lock = try_lock(tmp_path / "out" / ".lock")
    assert lock is not None
    with lock, pytest.raises(UserError, match="another suite is writing into"):
        suite(here())


def test_a_text_that_a_task_is_counted_in_may_not_change(suite, here, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcabd")
    source = f"[{{type: bigrams, triggers: 1, files: [{text}]}}]"
    suite(here(), "--base.data.sources", source)
    suite(here(), "--base.data.sources", source)
    text.write_text("abcabc")
    with pytest.raises(UserError, match=r"s0\.files is '\w+', now it is '\w+'; choose another"):
        suite(here(), "--base.data.sources", source)


class Failing:
    """Workers of which one dies."""

    count, running = 1, ()

    def __init__(self, count=None):
        pass

    def run(self, function, jobs):
        for number, (name, arguments) in enumerate(jobs):
            if number == 1:
                yield Outcome(name, failure="its process was ended by SIGKILL")
            else:
                yield Outcome(name, function(*arguments))


def test_a_cell_that_failed_is_told_and_tried_again(
    suite_file, here, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("memlm.evaluation.suite.runner.run_cell", fake_cell)
    monkeypatch.setattr("memlm.evaluation.suite.workers.Workers", Failing)
    words = [suite_file(), "--output", str(tmp_path / "out"), "--seeds", "[0, 1]"]
    assert main(words) == 1
    printed = capsys.readouterr()
    failed = "parity_gated_delta_w8_lr0.003_s1"
    assert f"[2/4] {failed}: failed, its process was ended by SIGKILL; the others" in printed.err
    assert f"1 of 4 cells failed ({failed}); the same command tries them again" in printed.err
    # The report is of the others, and says so.
    assert f"- not finished: {failed}" in printed.out

    again = here()
    monkeypatch.setattr("memlm.evaluation.suite.workers.Workers", lambda count: again)
    assert main(words) == 0
    assert again.jobs == [failed]
    printed = capsys.readouterr()
    assert "not finished" not in printed.out
    assert printed.out.startswith("| memory") and "| gated_delta" in printed.out


def test_ctrl_c_says_how_to_go_on(suite_file, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memlm.evaluation.suite.runner.run_cell", fake_cell)
    monkeypatch.setattr("memlm.evaluation.suite.workers.Workers", lambda count: here(stop=1))
    words = [suite_file(), "--output", str(tmp_path / "out")]
    assert main(words) == 130
    *_, last = capsys.readouterr().err.splitlines()
    command = f"python -m memlm.evaluation.suite {' '.join(words)}"
    assert last == f"interrupted; finished cells are kept, go on with: {command}"


def test_the_grid_without_training_and_the_list(suite_file, capsys, monkeypatch):
    path = suite_file(seeds=[0, 1])
    assert main([path, "--dry-run", "--only", "memory=attention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"parity_attention_w8_lr0.003_s0 +\d+ +[\d,]+ +8 +64 +0\.003$", lines[1])
    assert (len(lines), lines[-1]) == (4, "2 cells")

    monkeypatch.setattr("memlm.evaluation.suite.main.FOLDER", Path(path).parent)
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny  Tiny: Does it run?"
    assert lines[1].strip() == "memories: attention, gated_delta; presets: none"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "usage: python -m memlm.evaluation.suite NAME"),
        (["FILE", "--processes", "0"], "--processes: must be at least 1, got 0"),
        (["FILE", "--only", "seed=5"], "--only seed=5: no cell has it"),
        (["FILE", "--base.train.stepz", "5"], "'train.stepz'"),
        (["FILE", "rest"], "unexpected argument 'rest'"),
    ],
)
def test_mistakes_on_the_command_line(suite_file, words, part, capsys):
    path = suite_file()
    assert main([path if word == "FILE" else word for word in words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and part in printed
    assert printed.count("\n") == 1
