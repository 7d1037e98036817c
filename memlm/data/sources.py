"""Documents of local files and of the standard library, one string per document."""

import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlm.errors import UserError, nearest

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_PARQUET_BUFFER = 1 << 20  # bytes
_PARQUET_ROWS = 256  # decoded at once
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def stdlib_documents() -> Iterator[str]:
    """The running Python's standard-library sources, one document per .py file, paths sorted.

    Test folders and installed packages are left out: about 12 MB. The texts differ between
    Python versions, so recorded scores should name the version.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    if not paths:
        raise UserError(f"source stdlib: this Python has no .py files under {root}")
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_bytes().decode("utf-8", errors="replace")
        if text.strip():
            yield text


def find_files(entries: list[str]) -> list[Path]:
    """Files named by paths, folders (searched recursively for text suffixes) and globs, sorted.

    Raises UserError naming the entry that leads to no file.
    """
    found: list[Path] = []
    for entry in entries:
        try:
            found.extend(sorted(_matches(entry)))
        except (OSError, RuntimeError) as error:  # a forbidden folder, no home of a user
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"source text: cannot look for {entry!r} ({reason})") from error
    return list(dict.fromkeys(found))


def _matches(entry: str) -> list[Path]:
    if not entry.strip():
        raise UserError("source text: an entry of files is empty; name a file, folder or glob")
    path = Path(entry).expanduser()
    if path.is_dir():
        matches = [p for p in path.rglob("*") if _suffix(p) in TEXT_SUFFIXES and p.is_file()]
        if not matches:
            raise UserError(
                f"source text: folder {entry!r} holds no {', '.join(TEXT_SUFFIXES)} file"
            )
        return matches
    if path.is_file():
        return [path]
    if glob.has_magic(entry):
        matches = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not matches:
            raise UserError(f"source text: no file matches {entry!r}")
        return matches
    if path.exists():
        raise UserError(f"source text: {entry!r} is neither a file nor a folder")
    raise UserError(f"source text: file {entry!r} does not exist")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def text_documents(files: list[str], column: str = "text") -> Iterator[str]:
    """Documents of local files: a whole txt or md file, a jsonl record, a parquet row.

    One document is in memory at a time, of parquet files about a row group. Nulls of a parquet file
    and documents of white space are left out.

    Raises UserError naming the file, and the line or row, where it is missing, empty, damaged,
    binary or not UTF-8, or lacks `column`.
    """
    for path in find_files(files):
        count = 0
        try:
            for document in _read_file(path, column):
                if document.strip():
                    count += 1
                    yield document
        except OSError as error:
            raise UserError(f"source text: cannot read {str(path)!r} ({error.strerror})") from error
        if count == 0:
            raise UserError(f"source text: file {str(path)!r} is empty")


def _read_file(path: Path, column: str) -> Iterator[str]:
    if _suffix(path) == ".parquet":
        return _parquet_documents(path, column)
    if _suffix(path) == ".jsonl":
        return _jsonl_documents(path, column)
    return _whole_text(path)


def _whole_text(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes(), path, 1)


def _decode(data: bytes, path: Path, line: int) -> str:
    """Text of bytes that begin at a line of a file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"source text: file {path}:{line} is binary or not UTF-8 text (byte "
            f"0x{data[error.start]:02x}); convert it to UTF-8"
        ) from error
    if "\0" in text:
        line += data.count(b"\n", 0, data.index(b"\0"))
        raise UserError(f"source text: file {path}:{line} is binary, not text (a zero byte)")
    return text


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    # Bytes end their lines at \n alone: JSON strings may hold U+2028 and its like.
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            line = _decode(data, path, number)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or str(error)
                raise UserError(f"source text: {path}:{number} is not JSON ({reason})") from error
            yield _field(record, column, f"{path}:{number}")


def _field(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        names = list(record) if isinstance(record, dict) else []
        raise UserError(f"source text: {where} has no field {column!r}{nearest(column, names)}")
    text = record[column]
    if not isinstance(text, str):
        raise UserError(f"source text: {where}: field {column!r} is not a string")
    # JSON can escape half a surrogate pair, which is no text that a tokenizer takes.
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Otherwise the columns of row groups to come are read as well.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source text: file {str(path)!r} is not a parquet file") from error
    with table:
        names = table.schema_arrow.names
        if column not in names:
            hint = nearest(column, names) or f" (valid: {', '.join(names)})"
            raise UserError(f"source text: {str(path)!r} has no column {column!r}{hint}")
        _check_strings(table.schema_arrow.field(column).type, column, f"{str(path)!r}")
        row = 0
        try:
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    text = value.as_py()
                    row += 1
                    if text is not None:
                        yield text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"source text: {str(path)!r} is damaged after row {row} ({reason})"
            ) from error


def _check_strings(found: Any, column: str, where: str) -> None:
    from pyarrow import types

    value = found.value_type if types.is_dictionary(found) else found
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_kind(value) for is_kind in strings):
        raise UserError(f"source text: {where}: column {column!r} holds {found}, not strings")
