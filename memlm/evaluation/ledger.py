"""The records of an evaluation on disk: one line per finished batch, so that nothing runs twice.

A batch is written with a single append that is flushed to the disk. A line that a killed process
left unfinished is dropped, and its batch runs again.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlm.errors import UserError
from memlm.evaluation.tasks.base import Record
from memlm.files import try_lock

IDENTITY = "evaluation.json"
FOLDER = "records"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Trials of one setting that are asked together.

    Attributes:
        subject: number of the model.
        task: name of the task.
        setting: label of the setting.
        first, last: the trials [first, last).
    """

    subject: int
    task: str
    setting: str
    first: int
    last: int

    @property
    def key(self) -> str:
        """One string for all of it."""
        return f"{self.subject}/{self.task}/{self.setting}/{self.first}-{self.last}"


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished batch: its records and what it cost."""

    batch: Batch
    records: list[Record]
    costs: dict[str, Any]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Done":
        """What `to_json` wrote."""
        values = json.loads(line)
        records = [Record(**record) for record in values["records"]]
        return cls(Batch(**values["batch"]), records, values["costs"])


class Ledger:
    """The finished batches of an evaluation, of all its processes.

    Attributes:
        done: by key.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], process: int = 0):
        """Open the ledger of a folder, with all that earlier runs finished; None = in memory only.

        Args:
            folder: the output folder of the evaluation; it is made where it does not exist.
            identity: everything that the numbers depend on; records of another one are refused.
            process: number of this process; each writes a file of its own.

        Raises:
            UserError: when the folder holds the records of another evaluation, or damaged ones, or
                when another process is at work there.
        """
        self.done: dict[str, Done] = {}
        self.file = None
        if folder is None:
            return
        records = folder / FOLDER
        path = records / f"{process}.jsonl"
        try:
            self.lock = try_lock(records / f".{process}.lock")
        except OSError as error:
            raise UserError(f"output: {records} cannot be written ({error.strerror})") from error
        if self.lock is None:
            raise UserError(f"output: another evaluation is writing into {folder}")
        try:
            _check_identity(folder / IDENTITY, identity, process)
            for file in sorted(records.glob("*.jsonl")):
                self.done |= {done.batch.key: done for done in _read(file, repair=file == path)}
            # Half of a surrogate pair is written as JSON's escape.
            self.file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except BaseException:
            self.lock.release()
            raise

    def add(self, done: Done) -> None:
        """Keep a finished batch."""
        self.done[done.batch.key] = done
        if self.file is not None:
            self.file.write(done.to_json() + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file; the ledger can still be read."""
        if self.file is not None:
            self.file.close()
            self.file = None
            self.lock.release()


def read_records(folder: Path) -> Iterator[Done]:
    """The finished batches of an output folder, of all processes.

    Raises:
        UserError: for a damaged file.
    """
    for file in sorted((folder / FOLDER).glob("*.jsonl")):
        yield from _read(file, repair=False)


def _check_identity(path: Path, identity: dict[str, Any], process: int) -> None:
    if not path.exists():
        if process == 0:
            unfinished = path.with_suffix(".json.new")
            unfinished.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no identity")
    except (OSError, ValueError) as error:
        raise UserError(f"output: {path} is damaged; choose another folder") from error
    if found != json.loads(json.dumps(identity)):
        changed = [
            key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key)
        ]
        raise UserError(
            f"output: {path.parent} holds records of another evaluation "
            f"({', '.join(changed)} differ); choose another folder"
        )


def _read(path: Path, repair: bool) -> Iterator[Done]:
    """The finished batches of a file; `repair` cuts off an unfinished last line."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            yield Done.from_json(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"output: {path}:{number} is damaged; choose another folder") from error
    if repair and whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)
