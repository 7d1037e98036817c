"""Shards are the same bytes for any number of workers, and after any number of violent deaths."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from memlm.data import ByteTokenizer, shard_manifest, shard_writer, shards
from memlm.data.config import TextSource
from memlm.data.shards import prepare_shards
from memlm.data.text_origin import TextOrigin, text_origin
from memlm.errors import UserError
from tests.data.dying import FORK, deadly, run_apart

FRACTION = 0.2


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextOrigin:
    """Texts of 60 documents in about 20 chunks."""
    monkeypatch.setattr(shard_writer, "_LEAST_CHUNK", 1000)
    rng = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        text = "".join(rng.choices("abcdefgh \n", k=rng.randint(1, 700)))
        (folder / f"{number:02}.txt").write_text(f"{number} {text}")
    return text_origin(TextSource(files=[str(folder)]))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; the lock holds nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def build(root: Path, origin: TextOrigin, processes: int = 1) -> dict[str, bytes]:
    prepare_shards(root, origin, ByteTokenizer(), FRACTION, processes)
    return contents(root)


def test_any_number_of_workers_writes_the_same_bytes(origin: TextOrigin, tmp_path: Path) -> None:
    alone = build(tmp_path / "1", origin)
    assert len(alone) > 20
    assert not [name for name in alone if name.endswith((".partial", ".jsonl"))]
    assert build(tmp_path / "3", origin, 3) == alone


def test_killed_at_every_write_and_rename(
    origin: TextOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_LEAST_CHUNK", 5000)
    whole = build(tmp_path / "whole", origin)

    def build_and_die(root: Path, moment: int) -> None:
        kills = deadly(moment)
        # In the forked child only: before each, the process may end.
        os.fsync = kills(os.fsync)
        Path.replace = kills(Path.replace)
        Path.unlink = kills(Path.unlink)
        build(root, origin)

    for moment in range(1, 1000):
        root = tmp_path / f"cut {moment}"
        process = run_apart(build_and_die, root, moment)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert build(root, origin) == whole
    # Journal, shards, folder and manifest: each synced and renamed.
    assert moment > 2 * len(whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_again_and_again(
    origin: TextOrigin, tmp_path: Path, processes: int
) -> None:
    whole = build(tmp_path / "whole", origin, processes)
    rng = random.Random(processes)
    root, kills = tmp_path / "cut", 0

    def files() -> int:
        return len(list(root.rglob("*.safetensors")))

    while True:
        process = run_apart(build, root, origin, processes)
        enough = files() + rng.randint(1, 4)
        while process.is_alive() and files() < enough:
            pass
        time.sleep(rng.uniform(0, 0.003))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
    assert kills > 0  # few, where this process gets little of the machine
    # The workers of a dead process ended by themselves, and with them its lock.
    assert build(root, origin, processes) == whole


def test_finished_chunks_are_not_tokenised_again(
    origin: TextOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole", origin)
    written: list[str] = []

    def fill_disk(path: Path, data: bytes) -> None:
        if len(written) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        write(path, data)

    write = shard_writer.write_whole
    monkeypatch.setattr(shard_writer, "write_whole", fill_disk)
    with pytest.raises(UserError, match=r"No space left on device.*start again to go on"):
        build(tmp_path / "cut", origin)
    before = {name for name in written if name.startswith("train")}
    written.clear()
    # A finished file that was damaged since is made anew.
    damaged = next((tmp_path / "cut").rglob("train-000001.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    monkeypatch.setattr(
        shard_writer,
        "write_whole",
        lambda path, data: (written.append(path.name), write(path, data)),
    )
    assert build(tmp_path / "cut", origin) == whole
    again = before & set(written)
    assert damaged.name in again
    assert len(again) <= 2  # the other one is of the chunk that found the disk full


def test_two_at_once_tokenise_once(origin: TextOrigin, tmp_path: Path) -> None:
    root, calls = tmp_path / "shards", tmp_path / "calls"
    calls.mkdir()

    def counted(*arguments: object) -> None:
        (calls / str(os.getpid())).touch()
        time.sleep(0.2)
        write_shards(*arguments)

    def build_counted() -> None:
        shards.write_shards = counted
        build(root, origin)

    write_shards = shards.write_shards
    processes = [run_apart(build_counted) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(calls.iterdir())) == 1
    assert contents(root) == build(tmp_path / "alone", origin)


def test_one_who_waits_long_says_so(
    origin: TextOrigin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shards, "_PATIENCE", 0.05)
    folder = tmp_path / "shards" / origin.name
    folder.mkdir(parents=True)
    held = FORK.Event()

    def hold() -> None:
        with shards.locked(folder):
            held.set()
            time.sleep(0.5)

    process = run_apart(hold)
    held.wait()
    build(tmp_path / "shards", origin)
    process.join()
    assert "waiting for another process" in caplog.text


class DyingTokenizer(ByteTokenizer):
    """Its process is killed, as where memory runs out."""

    def encode_bytes(self, data: bytes):
        if data.startswith(b"30 "):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_bytes(data)


def test_a_killed_worker_is_told_and_made_good(origin: TextOrigin, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    with pytest.raises(UserError, match="a tokenising process was killed"):
        prepare_shards(root, origin, DyingTokenizer(), FRACTION, 2)
    assert build(root, origin) == build(tmp_path / "whole", origin)


def test_the_beginning_of_something_else_is_kept(
    origin: TextOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "shards"

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_manifest", fail)
        with pytest.raises(UserError, match=r"cannot be written \(broken\)"):
            build(root, origin)
    before = contents(root)
    with pytest.raises(UserError, match=r"validation_fraction 0.2, not 0.5; choose another"):
        prepare_shards(root, origin, ByteTokenizer(), 0.5)
    assert contents(root) == before
    (root / origin.name / shard_writer.JOURNAL_FILE).unlink()
    with pytest.raises(UserError, match="but no manifest"):
        build(root, origin)


def test_texts_that_change_while_they_are_read(
    origin: TextOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def survey(texts):
        found = survey_texts(texts)
        (tmp_path / "texts" / "40.txt").write_text("something else")
        return found

    survey_texts = shard_writer.survey_texts
    monkeypatch.setattr(shard_writer, "survey_texts", survey)
    with pytest.raises(UserError, match="changed while they were read"):
        build(tmp_path / "shards", origin)
    assert not list((tmp_path / "shards").rglob(shard_manifest.MANIFEST_FILE))
