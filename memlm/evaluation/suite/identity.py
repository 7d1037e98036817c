"""What the numbers of a suite depend on, kept in its folder so that nothing else is mixed in."""

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import memlm
from memlm.config import RunConfig
from memlm.data.config import SyntheticSource
from memlm.data.sources import find_files
from memlm.errors import UserError
from memlm.evaluation.runner import device_name, input_hashes, versions
from memlm.evaluation.suite.cells import Cell
from memlm.evaluation.suite.config import SuiteConfig
from memlm.files import file_hash, write_file

_THEN = "give the same command again"


def identity_of(suite: SuiteConfig, cells: Iterable[Cell]) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: value for name, value in versions().items() if name != "platform"}
    named = {"suite": suite.name, "preset": suite.preset, "device": device_name(device)}
    hashes: dict[str, str] = {}
    configs = {}
    for cell in cells:
        text = json.dumps([cell.config.data.sources, dataclasses.asdict(cell.config.evaluate)])
        if text not in hashes:
            hashes[text] = _files_hash(cell.config)
        configs[cell.key] = cell.config.to_dict() | {"files": hashes[text]}
    return named | {"versions": found, "cells": configs}


def _files_hash(config: RunConfig) -> str:
    """SHA-256 of the files that a run reads, 16 hexadecimal digits."""
    found = input_hashes(config.evaluate)
    entries = [
        entry
        for source in config.data.parsed_sources()
        for entry in getattr(source, "files", None) or []
    ]
    paths = find_files(entries) if entries else []
    for source in config.data.parsed_sources():
        if isinstance(source, SyntheticSource):
            paths += source.generator.input_files()
    found |= {str(path): file_hash(path) for path in paths}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def code_revision(folder: Path | None = None) -> str | None:
    """The git commit that last changed the package, with "+" where files differ from it.

    Args:
        folder: of the package; None = where memlm is.

    Returns:
        None where the package is not in a git checkout: then its version tells the code.
    """
    folder = Path(memlm.__file__).parent if folder is None else folder

    def git(*words: str) -> str:
        words = ("git", "-C", str(folder), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", ".")
        changed = commit and git("--no-optional-locks", "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{'+' if changed else ''}" if commit else None


def check_identity(
    path: Path, identity: dict[str, Any], revision: str | None = None
) -> list[str | None]:
    """Raise UserError when the folder is of something else; add cells that are new.

    So a suite may get more memories, widths, learning rates or seeds.

    Args:
        path: suite.json, which is written.
        identity: of `identity_of`.
        revision: of the code. Another one is no error: most changes of code change no number.

    Returns:
        The revisions of the code that have worked on the folder, this one last; None for one that
        is not known.
    """
    wanted = json.loads(json.dumps(identity))
    revisions: list[str | None] = []
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            cells = there["cells"] | wanted["cells"]
            same = there["cells"].keys() & wanted["cells"].keys()
            revisions = list(there.pop("revisions", [None]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged; choose another folder with --output") from error
        before, after = _leaves(there), _leaves(wanted)
        for way in sorted(before.keys() | after.keys()):
            if way[0] == "cells" and way[1] not in same:
                continue
            if before.get(way) != after.get(way):
                raise UserError(
                    f"{path.parent}: its {'.'.join(way)} is {before.get(way)!r}, now it is "
                    f"{after.get(way)!r}; choose another folder with --output, or delete this one"
                )
        wanted["cells"] = cells
    revisions = [one for one in revisions if one != revision] + [revision]
    content = wanted | {"revisions": revisions}
    write_file(path, lambda new: new.write_text(json.dumps(content, indent=1) + "\n"), then=_THEN)
    return revisions


def _leaves(value: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of nested mappings and lists by the way to them."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = (_leaves(item, (*prefix, str(key))) for key, item in items)
        return {name: leaf for leaves in nested for name, leaf in leaves.items()}
    return {prefix: value}
