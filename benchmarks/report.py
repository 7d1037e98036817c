"""What a benchmark leaves: a table to read, a JSON file per machine."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "flash-linear-attention",
    "flash-qla",
    "titans-pytorch",
    "product-key-memory",
    "faiss-cpu",
)


def machine() -> dict[str, Any]:
    """What numbers taken now depend on: processors, libraries, threads."""
    return {**_machine(), "threads": torch.get_num_threads()}


@functools.cache
def _machine() -> dict[str, Any]:
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": None,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_processors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return name.group(1).strip() if name else platform.machine()


def machine_name() -> str:
    """The GPU's name, or else the CPU's, as a folder name."""
    name = machine()["gpu"] or machine()["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save_json(results: Mapping[str, Any], path: Path) -> Path:
    """Write `results` whole or not at all; dataclasses and paths become dicts and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(results, indent=1, default=_plain)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; numbers to the right, None as a dash.

    Raises:
        ValueError: a row with another number of cells than the header.
    """
    texts = [[_cell(value) for value in row] for row in rows]
    for row in texts:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row}")
    right = [
        bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]
    widths = [max(3, *(len(row[i]) for row in (header, *texts))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return "| " + " | ".join(placed) + " |"

    rule = (
        "-" * (width - 1) + (":" if is_right else "-")
        for width, is_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(header), line(list(rule)), *map(line, texts)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
