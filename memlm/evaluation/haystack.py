"""Real text as one long line of tokens on disk, read where it is needed."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.config import DataConfig
from memlm.data.corpus import Corpus, build_corpus, encode_documents, in_split
from memlm.data.sources import find_files, stdlib_documents, text_documents
from memlm.errors import UserError
from memlm.evaluation.prompts import well_formed


class Haystack:
    """Token ids of all documents, back to back, in a temporary file that goes with the object.

    Attributes:
        tokenizer: what made the ids.
        files: where it comes from; empty = the standard library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, files: list[str]):
        """Tokenise the texts.

        Args:
            tokenizer: of the model.
            files: as in `haystack_documents`.

        Raises:
            UserError: for a file that is missing, empty or binary.
        """
        self.tokenizer = tokenizer
        self.files = list(files)
        self.folder = tempfile.TemporaryDirectory(prefix="memlm-haystack-")
        self.path = Path(self.folder.name) / "tokens"
        tokens = 0
        with self.path.open("wb") as out:
            for ids in encode_documents(haystack_documents(self.files), tokenizer):
                out.write(ids.tobytes())
                tokens += len(ids)
                self.dtype = ids.dtype
        if tokens == 0:
            raise UserError("haystack: the files hold no text")
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to `stop`, int64; the text is repeated behind its end."""
        parts = [np.empty(0, dtype=self.dtype)]
        with self.path.open("rb") as file:
            while start < stop:
                begin = start % self.tokens
                count = min(stop - start, self.tokens - begin)
                file.seek(begin * self.dtype.itemsize)
                parts.append(np.fromfile(file, self.dtype, count))
                start += count
        return np.concatenate(parts).astype(np.int64)

    def piece(self, start: int, length: int) -> "HaystackPiece":
        """`length` tokens from `start` on; nothing is read yet."""
        return HaystackPiece(self, start, length)


@dataclass(frozen=True)
class HaystackPiece:
    """A stretch of a haystack as a piece of a context."""

    haystack: Haystack
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.haystack.read(self.start + start, self.start + stop)


def held_out_corpus(tokenizer: PreTrainedTokenizerBase, files: list[str]) -> Corpus:
    """The documents of `files`, or the held-out sources of the standard library, in memory.

    Raises:
        UserError: for a file that is missing, empty or binary.
    """
    return build_corpus(haystack_documents(files), tokenizer, "train", fraction=0.0)


def haystack_documents(files: list[str]) -> Iterator[str]:
    """The texts of `files`, or the held-out sources of the standard library.

    Held out are the documents that training with the default validation_fraction never sees.

    Args:
        files: paths, globs and folders as in a `text` source, and .json files with one text in the
            field "text", as RULER's essays are published.

    Raises:
        UserError: for a file that is missing, empty or binary.
    """
    if not files:
        fraction = DataConfig().validation_fraction
        yield from (text for text in stdlib_documents() if in_split(text, "validation", fraction))
    for path in find_files(files):
        texts = [_json_text(path)] if path.suffix == ".json" else text_documents([str(path)])
        yield from map(well_formed, texts)


def _json_text(path: Path) -> str:
    """The field "text" of a JSON file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"haystack: file {str(path)!r} is not JSON") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"haystack: file {str(path)!r} has no field 'text' with a string")
    return record["text"]
