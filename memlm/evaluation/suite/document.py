"""The section of a suite in a Markdown document."""

import json
import os
import re
from pathlib import Path
from typing import Any

from memlm.errors import UserError
from memlm.files import replace_file


def write_section(
    path: str | Path,
    name: str,
    preset: str | None,
    results: dict[str, Any],
    table: str,
    picture: bytes,
) -> None:
    """Put a suite's report into a document, and its numbers and picture beside.

    The section stands between <!-- suite NAME PRESET --> and <!-- /suite NAME PRESET -->: it takes
    the place of an older one or is added at the end; nothing else changes. Picture and results go
    to benchmarks/results/MACHINE/suites/NAME-PRESET.{png,json} of the repository that holds the
    document (the nearest folder above it with .git), or else of the document's own folder.

    Args:
        path: the document; it is made where it is missing.
        name: of the suite.
        preset: of the suite, if any.
        results: what results.json holds.
        table: Markdown.
        picture: PNG.

    Raises:
        UserError: where the document's markers do not belong together, or a file cannot be read
            or written; the document stays as it was.
    """
    path = Path(path)
    label = name if preset is None else f"{name} {preset}"
    try:
        # Line endings stay as they are.
        text = path.read_bytes().decode("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a Markdown document ({error})") from error
    place = _place(text, label, path)
    stem = name if preset is None else f"{name}-{preset}"
    base = _root(path) / "benchmarks" / "results" / machine_folder(results) / "suites" / stem
    image, numbers = base.with_name(f"{stem}.png"), base.with_name(f"{stem}.json")
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{image.parent}: cannot be made ({error.strerror})") from error
    link = Path(os.path.relpath(image, path.resolve().parent)).as_posix()
    section = _section(label, results, table, link)
    replace_file(image, picture)
    replace_file(numbers, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if place is not None:
        changed = text[: place[0]] + section + text[place[1] :]
    else:
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        changed = f"{text}{gap}{section}\n"
    replace_file(path, changed)


def machine_folder(results: dict[str, Any]) -> str:
    """The GPU's name, or else the processor's, as a folder name."""
    machine = results["machine"]
    name = machine.get("gpu") or machine.get("processor") or "unknown"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _place(text: str, label: str, path: Path) -> tuple[int, int] | None:
    """Where the section is; None where there is none."""
    start, end = f"<!-- suite {label} -->", f"<!-- /suite {label} -->"
    counts = text.count(start), text.count(end)
    if counts == (0, 0):
        return None
    first, last = text.find(start), text.find(end)
    if counts != (1, 1) or first > last:
        raise UserError(f"{path}: expected one {start} and one {end} after it; mend them by hand")
    return first, last + len(end)


def _root(path: Path) -> Path:
    folder = path.resolve().parent
    return next((one for one in (folder, *folder.parents) if (one / ".git").exists()), folder)


def _section(label: str, results: dict[str, Any], table: str, link: str) -> str:
    machine = results["machine"]
    where = [machine.get("processor") or "unknown processor"]
    if machine.get("cores"):
        where.append(f"{machine['cores']} cores")
    if machine.get("gpu"):
        where.append(machine["gpu"])
    versions = ", ".join(
        f"{name} {version}" for name, version in results["versions"].items() if name != "platform"
    )
    return "\n".join(
        [
            f"<!-- suite {label} -->",
            f"## {results['title']}",
            "",
            results["question"],
            "",
            "```",
            results["command"],
            "```",
            "",
            f"{', '.join(where)}. Versions: {versions}. Means over seeds, in brackets the lowest "
            "and the highest seed.",
            "",
            table.rstrip("\n"),
            "",
            f"![{results['title']}](<{link}>)",
            f"<!-- /suite {label} -->",
        ]
    )
