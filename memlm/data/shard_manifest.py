"""What a folder of shards is made from, and whether that is what is asked for now."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.corpus import adds_bos, token_dtype
from memlm.data.text_origin import TextOrigin
from memlm.data.tokenizers import byte_level
from memlm.errors import UserError
from memlm.files import file_hash, sync

FORMAT = "memlm shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"

Content = dict[str, Any]

# Words, digits, spaces, accents and a character outside the basic plane.
_PROBE = "The 3 quick\n\tfoxes'  über-naïve 12345 日本語 \U0001f98a def f(x): return x_1"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there complete or not at all, whenever this process dies."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text gets."""
    digest = hashlib.sha256()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest.update(json.dumps(vocabulary).encode())
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls with padding or truncation leave these behind; documents are encoded without.
        backend["truncation"] = backend["padding"] = None
        digest.update(json.dumps(backend, sort_keys=True).encode())
    elif hasattr(tokenizer, "sp_model"):
        digest.update(tokenizer.sp_model.serialized_model_proto())
    added = tokenizer.added_tokens_decoder.items()
    sample = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    rest = [sorted((i, repr(token)) for i, token in added), sample, bos, byte_level(tokenizer)]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()


def make_identity(
    tokenizer: PreTrainedTokenizerBase, fraction: float, source: Content, chunk_bytes: int
) -> Content:
    """What decides every byte of the shards; `source` is described by `describe_files` or a hash
    of the texts."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            "sha256": tokenizer_hash(tokenizer),
        },
        "validation_fraction": fraction,
        "source": source,
        "dtype": token_dtype(tokenizer).__name__,
        "chunk_bytes": chunk_bytes,
    }


def describe_files(origin: TextOrigin, known: Content | None = None, since: int = 0) -> Content:
    """Names, sizes and SHA-256 of the files of `origin`.

    Args:
        origin: texts of files.
        known: an earlier description, whose hash is taken for a file of the same name and size
            that did not change after `since` (nanoseconds, by the clock of the file system).
        since: see `known`.

    Raises:
        UserError: for a file that cannot be read.
    """
    hashes = {(f["name"], f["bytes"]): f["sha256"] for f in (known or {}).get("files", ())}
    files = []
    for path in origin.files() or ():
        try:
            status = path.stat()
            entry = {"name": path.as_posix(), "bytes": status.st_size}
            # The time of the change of the inode: moving an older file here counts as well.
            unchanged = max(status.st_ctime_ns, status.st_mtime_ns) < since
            found = hashes.get((entry["name"], entry["bytes"])) if unchanged else None
            files.append({**entry, "sha256": found or file_hash(path)})
        except OSError as error:
            raise UserError(f"source text: cannot read {str(path)!r} ({error.strerror})") from error
    return {"description": origin.description, "files": files}


def read_manifest(folder: Path) -> Content:
    """The manifest of finished shards; raises UserError when it is damaged or of another kind."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, or no manifest of shards; {_ADVICE}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of shards; choose another data.shards")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: shards of version {content.get('version')!r}, this memlm reads version "
            f"{VERSION}; {_ADVICE}"
        )
    if content.pop("sha256", None) != _checksum(content):
        raise UserError(f"{path}: altered since it was written (its SHA-256 differs); {_ADVICE}")
    return content


def write_manifest(folder: Path, content: Content) -> None:
    """Declare the shards of `folder` finished; every shard is on disk before."""
    sync(folder)
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=1)
    write_whole(folder / MANIFEST_FILE, (text + "\n").encode())
    sync(folder)


def require_same(folder: Path, found: Content, wanted: Content) -> None:
    """Raise UserError unless the shards in `folder`, made for `found`, are those `wanted`."""
    for key in ("format", "version", "tokenizer", "validation_fraction", "source", "chunk_bytes"):
        before, now = found.get(key), wanted[key]
        # Classes of the same tokenizer differ between versions of transformers.
        same = before == now if key != "tokenizer" else before["sha256"] == now["sha256"]
        if not same:
            raise UserError(f"{folder}: {_difference(key, before, now)}; {_ADVICE}")


_ADVICE = "choose another data.shards, or delete this folder to tokenise anew"


def _difference(key: str, found: Any, wanted: Any) -> str:
    """What is not the same, for the user."""
    if key == "tokenizer":
        names = [f"{entry['class']} of {entry['tokens']} tokens" for entry in (found, wanted)]
        others = f"{names[0]}, not {names[1]}" if names[0] != names[1] else f"also {names[0]}"
        return f"these shards were made with another tokenizer ({others})"
    if key == "source":
        return f"these shards were made from another source ({_source_difference(found, wanted)})"
    return f"these shards have {key} {found}, not {wanted}"


def _source_difference(found: Content, wanted: Content) -> str:
    if found["description"] != wanted["description"]:
        return f"{found['description']}, not {wanted['description']}"
    before, now = ({f["name"]: f for f in entry.get("files", ())} for entry in (found, wanted))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            change = "is new" if name not in before else "is gone" if name not in now else "changed"
            return f"file {name!r} {change}"
    return "the files come in another order" if before else "its texts changed"


def _checksum(content: Content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
