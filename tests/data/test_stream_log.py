"""Streams written through: the rows of the stream, read once, from any place, by any process."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from memlm.data import ByteTokenizer, DataConfig, PackedDataset, stream_log
from memlm.data.hub import HubReader
from memlm.errors import UserError
from tests.data.dying import deadly, run_apart

ROWS = 60  # of 32 tokens: more than an epoch


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty documents and a null in each of two parquet files, in chunks of about 100 bytes."""
    monkeypatch.setattr(stream_log, "_FIRST_CHUNK", 100)
    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = [chr(97 + i % 26) * (1 + i * 7 % 50) + str(i) for i in range(40)]
    for number in range(2):
        part = [*texts[number * 20 : number * 20 + 20], None]
        table = pyarrow.table({"text": pyarrow.array(part, pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet", row_group_size=7)
    # The library waits for seconds when it closes a shuffled stream of several files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were taken from a stream."""
    taken: list[str] = []
    rows = HubReader.__iter__

    def counted(self: HubReader) -> Iterator[str]:
        for text in rows(self):
            taken.append(text)
            yield text

    monkeypatch.setattr(HubReader, "__iter__", counted)
    return taken


def rows(dataset: Path, shards: Path | None, split: str = "train", **values) -> PackedDataset:
    lanes, buffer = values.pop("lanes", 1), values.pop("shuffle_buffer", 0)
    source = {"type": "hub", "dataset": str(dataset), "shuffle_buffer": buffer}
    config = DataConfig(
        sources=[source],
        validation_fraction=0.2,
        shards=None if shards is None else str(shards),
        **values,
    )
    return PackedDataset(config, ByteTokenizer(), split, 32, lanes)


def same(found: PackedDataset, expected: PackedDataset, indices: list[int]) -> None:
    one, other = found.batch(indices), expected.batch(indices)
    for name in other:
        assert torch.equal(one[name], other[name]), name


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("values", [{}, {"carry": True, "lanes": 3}, {"shuffle_buffer": 5}])
def test_rows_are_those_of_the_stream(dataset: Path, tmp_path: Path, values: dict) -> None:
    for split in ("train", "validation") if not values else ("train",):
        passing = rows(dataset, None, split, **values)
        written = rows(dataset, tmp_path / "shards", split, **values)
        same(written, passing, list(range(ROWS)))
        # Going back, and on from a late row in another process.
        same(written, passing, [5, 50, 7])
        same(rows(dataset, tmp_path / "shards", split, **values), passing, [50, 51])
    assert len(shard_files(tmp_path)) > 8


def test_what_was_read_is_not_read_again(
    dataset: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    first = rows(dataset, tmp_path / "shards")
    batch = first.batch(range(12))
    # No more than what was asked for.
    assert 0 < len(read) < 30
    read.clear()
    again = rows(dataset, tmp_path / "shards")
    assert torch.equal(again.batch([9, 10])["labels"], batch["labels"][[9, 10]])
    # What is there was verified as it was opened.
    monkeypatch.setattr(stream_log, "verify", None)
    held_out = PackedDataset(again.config, again.tokenizer, "validation", 8, store=again.store)
    held_out.row(0)
    again.with_length(16).row(0)
    assert not read


def test_a_later_process_reads_on_from_the_kept_state(
    dataset: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    expected = rows(dataset, None).batch(range(ROWS))["input_ids"]
    read.clear()
    rows(dataset, tmp_path / "shards").row(15)
    first = list(read)
    read.clear()
    later = rows(dataset, tmp_path / "shards")
    assert torch.equal(later.batch(range(ROWS))["input_ids"], expected)
    # The last chunk is compared, and nothing before it.
    overlap = first.index(read[0])
    assert overlap > 10
    assert read[: len(first) - overlap] == first[overlap:]
    assert len(first[:overlap] + read) == 40


@pytest.mark.parametrize("damage", ["state", "buffer"])
def test_without_a_state_it_reads_from_the_beginning(
    damage: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"shuffle_buffer": 4} if damage == "buffer" else {}
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    rows(dataset, tmp_path / "shards", **values).row(15)
    if damage == "state":
        broken = {"nonsense": 1}
        monkeypatch.setattr(HubReader, "state", property(lambda self: broken))
        (journal,) = tmp_path.rglob(stream_log.JOURNAL_FILE)
        lines = journal.read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            del entry["sha256"]
            if "state" in entry:
                entry["state"] = broken
        journal.write_text("".join(stream_log._signed(entry) + "\n" for entry in entries))
    later = rows(dataset, tmp_path / "shards", **values)
    same(later, rows(dataset, None, **values), list(range(ROWS)))


def test_a_stream_that_breaks_off_has_not_ended(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    expected = rows(dataset, None)
    found, broken = HubReader._rows, []

    def breaking(self: HubReader) -> Iterator[dict]:
        for number, row in enumerate(found(self)):
            if number == 20 and not broken:
                broken.append(number)
                raise UserError("the connection is lost")
            yield row

    monkeypatch.setattr(HubReader, "_rows", breaking)
    written = rows(dataset, tmp_path / "shards")
    with pytest.raises(UserError, match="the connection is lost"):
        written.batch(range(ROWS))
    # Another thread of this process may ask for the same chunk before the run has ended.
    same(written, expected, list(range(ROWS)))


def test_another_stream_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    rows(dataset, tmp_path / "shards").row(4)
    before = shard_files(tmp_path)
    table = pyarrow.table({"text": [f"other text {i}" * 3 for i in range(40)]})
    pyarrow.parquet.write_table(table, dataset / "train-0.parquet")
    again = rows(dataset, tmp_path / "shards")
    again.row(4)
    with pytest.raises(UserError, match=r"not the stream that was written here \(chunk 0"):
        again.row(30)
    assert shard_files(tmp_path) == before


def test_several_processes_write_what_one_writes(dataset: Path, tmp_path: Path) -> None:
    alone = rows(dataset, tmp_path / "alone")
    expected = alone.batch(range(ROWS))["input_ids"]

    def part(process: int) -> None:
        data = rows(dataset, tmp_path / "shards")
        for start in range(0, ROWS, 6):
            mine = list(range(start + 2 * process, start + 2 * process + 2))
            assert torch.equal(data.batch(mine)["input_ids"], expected[mine])

    processes = [run_apart(part, process) for process in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert shard_files(tmp_path / "shards") == shard_files(tmp_path / "alone")
    (journal,) = (tmp_path / "shards").rglob(stream_log.JOURNAL_FILE)
    assert len(journal.read_text().splitlines()) == 1 + len(alone.store._logs.popitem()[1].chunks)


def test_killed_at_every_write_and_rename(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_FIRST_CHUNK", 500)
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    whole = rows(dataset, tmp_path / "whole")
    expected = whole.batch(range(ROWS))["input_ids"]

    def read_and_die(root: Path, moment: int) -> None:
        kills = deadly(moment)
        os.fsync = kills(os.fsync)
        Path.replace = kills(Path.replace)
        stream_log.append_line = kills(stream_log.append_line)
        rows(dataset, root).row(ROWS)

    root = tmp_path / "cut"
    for moment in range(1, 100):
        process = run_apart(read_and_die, root, moment)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert moment > 3
    assert torch.equal(rows(dataset, root).batch(range(ROWS))["input_ids"], expected)
    assert shard_files(root) == shard_files(tmp_path / "whole")


def test_a_line_that_was_cut_short_comes_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)
    rows(dataset, tmp_path / "shards").row(4)
    (journal,) = tmp_path.rglob(stream_log.JOURNAL_FILE)
    journal.write_bytes(journal.read_bytes()[:-10])
    same(rows(dataset, tmp_path / "shards"), rows(dataset, None), list(range(ROWS)))


def test_damage_is_refused(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_log, "_AHEAD", 0)  # nothing is written behind the damage
    rows(dataset, tmp_path / "shards").row(20)
    (journal,) = tmp_path.rglob(stream_log.JOURNAL_FILE)
    text = journal.read_text()
    for wrong, message in (
        ("", "no first line"),
        (text.replace('"documents": ', '"documents": 1', 1), "a line's SHA-256 differs"),
        ("[1]\n" + text, "a line's SHA-256 differs"),
    ):
        journal.write_text(wrong)
        with pytest.raises(UserError, match=message):
            rows(dataset, tmp_path / "shards")
    journal.write_text(text)
    shard = next(tmp_path.rglob("train-000001.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000001.*altered"):
        rows(dataset, tmp_path / "shards")


def test_shards_of_something_else_are_refused(dataset: Path, tmp_path: Path) -> None:
    data = rows(dataset, tmp_path / "shards")
    data.row(0)
    with pytest.raises(UserError, match=r"validation_fraction 0.2, not 0.5"):
        PackedDataset(
            DataConfig(
                sources=data.config.sources, validation_fraction=0.5, shards=data.config.shards
            ),
            ByteTokenizer(),
            "train",
            32,
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.shards: .* cannot be written"):
        rows(dataset, tmp_path / "file")


def test_a_stream_without_text_for_the_split(dataset: Path, tmp_path: Path) -> None:
    for path in dataset.iterdir():
        path.unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["only"]}), dataset / "train.parquet")
    found = []
    for split in ("train", "validation"):
        try:
            rows(dataset, tmp_path / "shards", split).row(3)
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "holds no text for this split" in found[0]
