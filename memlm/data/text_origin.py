"""Texts on this machine that are read as a whole: what they are, and how to read them again."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.data.config import (
    HubSource,
    MqarSource,
    PasskeySource,
    Source,
    StdlibSource,
    StoriesSource,
    SyntheticSource,
    TextSource,
)
from memlm.data.hub import hub_documents, prepared_files
from memlm.data.sources import find_files, stdlib_documents, text_documents


@dataclass(frozen=True)
class TextOrigin:
    """The texts of a source that is not streamed; sources with equal texts have equal origins.

    Attributes:
        kind: stdlib, text or hub.
        source: what the config says of the texts, as JSON.
    """

    kind: str
    source: str

    @property
    def description(self) -> dict[str, Any]:
        """What the config says about the texts."""
        return {"type": self.kind, **json.loads(self.source)}

    @property
    def name(self) -> str:
        """A folder name that differs between origins."""
        if self.kind == "stdlib":
            return self.kind
        return f"{self.kind}-{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"

    def documents(self) -> Iterator[str]:
        """The texts in their order; raises UserError for what cannot be read."""
        if self.kind == "stdlib":
            return stdlib_documents()
        if self.kind == "hub":
            return hub_documents(self._dataset(), 0)
        given = json.loads(self.source)
        return text_documents(given["files"], given["column"])

    def files(self) -> list[Path] | None:
        """The files that hold the texts, in order; None where only the texts tell.

        Raises UserError for an entry that leads to no file.
        """
        return find_files(self.description["files"]) if self.kind == "text" else None

    def prepared(self) -> list[list[Any]] | None:
        """Files that stand for the texts of a Hub dataset; None where there are none.

        Raises UserError as `documents`.
        """
        return (prepared_files(self._dataset()) or None) if self.kind == "hub" else None

    def _dataset(self) -> HubSource:
        return HubSource(**json.loads(self.source), streaming=False)


def text_origin(source: Source) -> TextOrigin | None:
    """Where the texts of `source` come from; None for streams and for rows without text."""
    if isinstance(source, MqarSource | StoriesSource | SyntheticSource):
        return None
    if isinstance(source, HubSource) and source.streaming:
        return None
    if isinstance(source, HubSource):
        names = ("dataset", "config", "split", "column")
        return TextOrigin("hub", json.dumps({n: getattr(source, n) for n in names}))
    if isinstance(source, StdlibSource) or source.files is None:
        return TextOrigin("stdlib", "{}")
    assert isinstance(source, TextSource | PasskeySource)
    column = source.column if isinstance(source, TextSource) else "text"
    return TextOrigin("text", json.dumps({"files": source.files, "column": column}))
