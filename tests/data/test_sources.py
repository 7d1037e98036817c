"""Document iterators: what counts as a document, and which files are refused."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memlm.data.config import HubSource
from memlm.data.hub import find_revision, hub_documents
from memlm.data.sources import stdlib_documents, text_documents
from memlm.errors import UserError


def test_stdlib_is_deterministic_real_text() -> None:
    texts = list(stdlib_documents())
    assert texts == list(stdlib_documents())
    assert sum(len(text) for text in texts) > 5_000_000
    assert any("class OrderedDict" in text for text in texts)
    # Neither the test folders nor installed packages are in it.
    assert not any("support.run_unittest" in text and "class TestCase" in text for text in texts)
    assert not any("class AutoModelForCausalLM" in text for text in texts)


def write_parquet(path: Path, columns: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    (tmp_path / "sub").mkdir()
    # A line separator inside a JSON string is no end of line of the file.
    records = [{"text": "three\u2028"}, {"text": "four", "id": 1}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "sub" / "c.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    write_parquet(tmp_path / "sub" / "d.parquet", {"text": ["five", None, "six"]})
    everything = ["one", "two", "three\u2028", "four", "five", "six"]
    assert list(text_documents([str(tmp_path)])) == everything
    assert list(text_documents([f"{tmp_path}/*.txt", f"{tmp_path}/**/*.md"])) == ["two", "one"]
    # Named twice, read once.
    assert list(text_documents([f"{tmp_path}/b.txt", str(tmp_path)])) == [
        "two",
        *(text for text in everything if text != "two"),
    ]


def test_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    write_parquet(tmp_path / "b.parquet", {"body": ["y"]})
    assert list(text_documents([str(tmp_path)], column="body")) == ["x", "y"]


def test_refused_files(tmp_path: Path) -> None:
    files = {
        "empty.txt": b"",
        "blank.md": b" \n",
        "zero.txt": b"ab\0cd",
        "latin.txt": b"caf\xe9",
        "broken.jsonl": b'{"text": "a"}\n{"text": ',
        "field.jsonl": b'{"texts": "a"}',
        "number.jsonl": b'{"text": 3}',
        "fake.parquet": b"PAR1 it is not",
        "none.jsonl": b"",
        "late.txt": b"one\ntwo\n\xff",
        "late.jsonl": b'{"text": "a"}\n\n{"text": "\xff"}',
        "zero.jsonl": b'{"text": "a\0"}',
        "deep.jsonl": b"[" * 100_000,
        "long.jsonl": b'{"text": ' + b"1" * 5000 + b"}",
        "list.jsonl": b"[1]\n",
    }
    reasons = {
        "empty.txt": "is empty",
        "blank.md": "is empty",
        "zero.txt": "binary",
        "latin.txt": "binary or not UTF-8",
        "broken.jsonl": r"broken.jsonl:2 is not JSON",
        "field.jsonl": "no field 'text'; did you mean 'texts'",
        "number.jsonl": "not a string",
        "fake.parquet": "not a parquet file",
        "none.jsonl": "is empty",
        "late.txt": r"late.txt:3 is binary or not UTF-8 text \(byte 0xff\)",
        "late.jsonl": r"late.jsonl:3 is binary or not UTF-8",
        "zero.jsonl": r"zero.jsonl:1 is binary",
        "deep.jsonl": r"deep.jsonl:1 is not JSON",
        "long.jsonl": r"long.jsonl:1 is not JSON",
        "list.jsonl": r"list.jsonl:1 has no field",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reasons[name]) as error:
            list(text_documents([str(tmp_path / name)]))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    write_parquet(tmp_path / "other.parquet", {"body": ["y"]})
    with pytest.raises(UserError, match="has no column 'text'"):
        list(text_documents([str(tmp_path / "other.parquet")]))


def test_parquet_files_that_hold_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xff")
    )
    for column, message in (
        ([1, 2], "a.parquet': column 'text' holds int64, not strings"),
        (broken, r"a.parquet' is damaged after row 1 \('utf-8'"),
        (pyarrow.array([], pyarrow.string()), "a.parquet' is empty"),
        (pyarrow.array([None, None], pyarrow.string()), "a.parquet' is empty"),
    ):
        write_parquet(path, {"text": column})
        with pytest.raises(UserError, match=message):
            list(text_documents([str(path)]))
    write_parquet(path, {"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    assert list(text_documents([str(path)])) == ["a", "b", "a"]
    # Pages that no longer unpack, far behind the beginning.
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, size=900))) for _ in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100_000] = bytes(100_000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.parquet' is damaged after row \d+ ") as error:
        list(text_documents([str(path)]))
    assert "\n" not in str(error.value)


def test_halves_of_surrogate_pairs_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83dx"}\n{"text": "\\ud83d\\ude00"}')
    assert list(text_documents([str(tmp_path / "a.jsonl")])) == ["?x", "\N{GRINNING FACE}"]


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.txt' does not exist"):
        list(text_documents([str(tmp_path / "nowhere.txt")]))
    with pytest.raises(UserError, match="no file matches"):
        list(text_documents([f"{tmp_path}/*.txt"]))
    with pytest.raises(UserError, match="folder .* holds no"):
        list(text_documents([str(tmp_path)]))
    os.mkfifo(tmp_path / "pipe.txt")
    for entry, message in (
        (" ", "an entry of files is empty"),
        ("x" * 5000, "cannot look for 'x"),
        ("~nobody-has-this-name/x", "cannot look for '~nobody"),
        (str(tmp_path / "pipe.txt"), "neither a file nor a folder"),
    ):
        with pytest.raises(UserError, match=message):
            list(text_documents([entry]))
    (tmp_path / "UPPER.TXT").write_text("upper")
    assert list(text_documents([str(tmp_path)])) == ["upper"]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    records = [{"text": f"document {i}", "id": i} for i in range(6)]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "train.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_documents_keep_their_order(hub_folder: Path, streaming: bool) -> None:
    source = HubSource(dataset=str(hub_folder), streaming=streaming)
    assert list(hub_documents(source, 0)) == [f"document {i}" for i in range(6)]


def test_hub_shuffle_buffer_is_seeded(hub_folder: Path) -> None:
    source = HubSource(dataset=str(hub_folder), shuffle_buffer=6)
    orders = [list(hub_documents(source, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_hub_columns_without_text_and_readings_that_break_off(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="column 'id' holds int, not strings"):
        list(hub_documents(HubSource(dataset=str(hub_folder), column="id"), 0))

    class Broken:
        def __iter__(self):
            yield {"text": "one"}
            raise ConnectionError("the line is\ndead")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    documents = hub_documents(HubSource(dataset="some/where"), 0)
    assert next(documents) == "one"
    with pytest.raises(UserError, match=r"cannot read on after 1 rows of 'some/where' \(the"):
        next(documents)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="cannot load 'some/where' .*refused"):
        find_revision(HubSource(dataset="some/where"))


def test_hub_mistakes(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
        list(hub_documents(HubSource(dataset=str(hub_folder), column="txt"), 0))
    with pytest.raises(UserError, match="cannot load"):
        list(hub_documents(HubSource(dataset=str(hub_folder), split="tests"), 0))
    with pytest.raises(UserError, match="cannot load 'no/such-dataset'"):
        list(hub_documents(HubSource(dataset="no/such-dataset"), 0))
