"""Document iterators: what counts as a document, and which files are refused."""

import json
from pathlib import Path

import pytest

from memlm.data.config import HubSource
from memlm.data.hub import hub_documents
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


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow
    import pyarrow.parquet

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


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.txt' does not exist"):
        list(text_documents([str(tmp_path / "nowhere.txt")]))
    with pytest.raises(UserError, match="no file matches"):
        list(text_documents([f"{tmp_path}/*.txt"]))
    with pytest.raises(UserError, match="folder .* holds no"):
        list(text_documents([str(tmp_path)]))


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


def test_hub_mistakes(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
        list(hub_documents(HubSource(dataset=str(hub_folder), column="txt"), 0))
    with pytest.raises(UserError, match="cannot load"):
        list(hub_documents(HubSource(dataset=str(hub_folder), split="tests"), 0))
    with pytest.raises(UserError, match="cannot load 'no/such-dataset'"):
        list(hub_documents(HubSource(dataset="no/such-dataset"), 0))
