"""Where documents come from: iterators over the texts of a source, one string per document."""

import glob
import json
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from memlm.data.config import HubSource
from memlm.errors import UserError, nearest

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
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
        path = Path(entry).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()]
            if not matches:
                raise UserError(
                    f"source text: folder {entry!r} holds no {', '.join(TEXT_SUFFIXES)} file"
                )
        elif path.is_file():
            matches = [path]
        elif glob.has_magic(entry):
            matches = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            if not matches:
                raise UserError(f"source text: no file matches {entry!r}")
        else:
            raise UserError(f"source text: file {entry!r} does not exist")
        found.extend(sorted(matches))
    return list(dict.fromkeys(found))


def text_documents(files: list[str], column: str = "text") -> Iterator[str]:
    """Documents of local files: a whole txt or md file, a jsonl record, a parquet row.

    Raises UserError naming the file when it is missing, empty, binary or lacks `column`.
    """
    for path in find_files(files):
        documents = _read_file(path, column)
        count = 0
        for document in documents:
            if document.strip():
                count += 1
                yield document
        if count == 0:
            raise UserError(f"source text: file {str(path)!r} is empty")


def _read_file(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        return _parquet_documents(path, column)
    if path.suffix == ".jsonl":
        return _jsonl_documents(path, column)
    return iter([_read_text(path)])


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"source text: cannot read {str(path)!r} ({error.strerror})") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"source text: file {str(path)!r} is binary or not UTF-8 text") from error
    if "\0" in text:
        raise UserError(f"source text: file {str(path)!r} is binary, not text")
    return text


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"source text: {path}:{number} is not JSON ({error.msg})") from error
        if not isinstance(record, dict) or column not in record:
            names = list(record) if isinstance(record, dict) else []
            raise UserError(
                f"source text: {path}:{number} has no field {column!r}{nearest(column, names)}"
            )
        if not isinstance(record[column], str):
            raise UserError(f"source text: {path}:{number}: field {column!r} is not a string")
        yield record[column]


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"source text: file {str(path)!r} is not a parquet file") from error
    names = table.schema_arrow.names
    if column not in names:
        hint = nearest(column, names) or f" (valid: {', '.join(names)})"
        raise UserError(f"source text: {str(path)!r} has no column {column!r}{hint}")
    for batch in table.iter_batches(columns=[column]):
        yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))


def hub_documents(source: HubSource, seed: int) -> Iterator[str]:
    """Documents of a Hub dataset in stream order, or through a seeded shuffle buffer.

    Raises UserError when the dataset, config, split or column cannot be found.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.dataset, source.config, split=source.split, streaming=source.streaming
        )
        if source.shuffle_buffer and source.streaming:
            dataset = dataset.shuffle(seed=seed, buffer_size=source.shuffle_buffer)
        rows = iter(dataset)
        first = next(rows, None)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"source hub: cannot load {source.dataset!r} ({reason})") from error
    if first is None:
        raise UserError(f"source hub: {source.dataset!r} split {source.split!r} is empty")
    if source.column not in first:
        hint = nearest(source.column, first) or f" (valid: {', '.join(first)})"
        raise UserError(f"source hub: {source.dataset!r} has no column {source.column!r}{hint}")
    for row in chain([first], rows):
        if isinstance(row[source.column], str):
            yield row[source.column]
