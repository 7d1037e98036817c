"""Kills at every file operation, and one of a real process."""

import builtins
import errno
import itertools
import multiprocessing
import os
import random
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.crash import Crashes
from memlm.errors import UserError
from memlm.files import discard, recover, replace_file, write_folder
from memlm.training.checkpoint import write_checkpoint
from memlm.training.manifest import check_manifest
from memlm.training.retention import checkpoint_path, complete_checkpoints, keep_latest

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


class Killed(BaseException):
    """Nothing may catch it: a killed process cleans nothing up."""


@contextmanager
def failing(at: int, error: BaseException):
    """The file operation number `at`, from 0, raises `error`; yields a list with their number."""
    done = [0]

    def counted(operation):
        def call(*arguments, **options):
            done[0] += 1
            if done[0] == at + 1:
                raise error
            return operation(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(builtins, "open", counted(builtins.open))
        yield done


def new(folder: Path) -> None:
    for name in ("a", "b"):
        with open(folder / name, "w") as file:
            file.write("new")
    (folder / "c").mkdir()


def old(folder: Path) -> None:
    (folder / "a").write_text("old")


def content(folder: Path) -> dict[str, str | None] | None:
    if not folder.exists():
        return None
    return {p.name: p.read_text() if p.is_file() else None for p in folder.iterdir()}


OLD, NEW = {"a": "old"}, {"a": "new", "b": "new", "c": None}


@pytest.mark.parametrize("before", [None, OLD])
def test_a_kill_at_any_operation_leaves_the_old_folder_or_the_new_one(tmp_path, before):
    found = []
    for at in itertools.count():
        target = tmp_path / str(at) / "step"
        target.parent.mkdir()
        if before:
            write_folder(target, old)
        try:
            with failing(at, Killed()):
                write_folder(target, new)
        except Killed:
            recover(target.parent)
            found.append(content(target))
            assert [p.name for p in target.parent.iterdir()] == (["step"] if found[-1] else [])
            write_folder(target, new)  # as a resumed run does
        assert content(target) == NEW
        assert [path.name for path in target.parent.iterdir()] == ["step"]
        if len(found) == at:  # there were no more operations
            break
    assert at > 10
    assert before in found and NEW in found
    assert all(one in (before, NEW) for one in found)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_any_operation_leaves_one_of_both_and_no_part(tmp_path, number):
    for at in itertools.count():
        target = tmp_path / str(at) / "step"
        target.parent.mkdir()
        write_folder(target, old)
        refused = OSError(number, os.strerror(number))
        with failing(at, refused) as done:
            try:
                write_folder(target, new)
            except UserError as error:
                message = f"{target}: could not be written ({os.strerror(number)})"
                assert str(error).startswith(message)
        if done[0] <= at:
            break
        assert content(target) in (OLD, NEW)
        recover(target.parent)
        assert [path.name for path in target.parent.iterdir()] == ["step"]
    assert at > 10


def test_a_kill_in_a_deletion_never_leaves_a_part_under_the_name(tmp_path):
    found = []
    for at in itertools.count():
        target = tmp_path / str(at) / "step"
        target.parent.mkdir()
        write_folder(target, new)
        with failing(at, Killed()) as done:
            try:
                discard(target)
            except Killed:
                found.append(content(target))
        if done[0] <= at:
            break
        recover(target.parent)
        assert content(target) == found[-1]
        assert found[-1] is not None or not list(target.parent.iterdir())
    assert None in found and NEW in found
    assert all(one in (None, NEW) for one in found)


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path, found = tmp_path / "metrics.jsonl", []
    for at in itertools.count():
        replace_file(path, "old")
        with failing(at, Killed()) as done, suppress(Killed):
            replace_file(path, "new")
        if done[0] <= at:
            break
        recover(tmp_path, path.name)
        found.append(path.read_text())
        assert list(tmp_path.iterdir()) == [path]
    assert set(found) == {"old", "new"}


def test_killed_writers_leave_whole_checkpoints(tmp_path):
    def write(folder: Path) -> None:
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(os.urandom(20_000))

    rng = random.Random(0)
    for _ in range(8):
        # Forked: it only writes files, and need not import anything first.
        process = multiprocessing.get_context("fork").Process(
            target=lambda: [
                (
                    write_checkpoint(checkpoint_path(tmp_path, step % 4), write),
                    keep_latest(tmp_path, 3),
                )
                for step in itertools.count()
            ]
        )
        process.start()
        process.join(rng.uniform(0.02, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -9
        recover(tmp_path / "checkpoints")
        for path in (tmp_path / "checkpoints").iterdir():
            check_manifest(path)
    assert complete_checkpoints(tmp_path)


@pytest.mark.slow
def test_killed_runs_end_like_one_that_nobody_killed(tmp_path):
    crashes = Crashes(tmp_path / "runs", steps=8)
    outcome = crashes.run(1, kills=1)  # while a checkpoint is written
    assert outcome.kills
    assert not outcome.problems
