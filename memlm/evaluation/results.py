"""The files of a finished evaluation."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from memlm.errors import UserError

RESULTS = "results.json"


def check_output(output_dir: str | Path | None) -> None:
    """Raise UserError when results would be overwritten or the folder cannot be one."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    if (folder / RESULTS).exists():
        raise UserError(f"output: {folder} already holds {RESULTS}; choose another folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output: {folder} cannot be written ({existing} is no writable folder)")


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, the plots and report.html into `folder`.

    They are made in a hidden folder beside and moved at the end, results.json last: a folder with
    results.json is complete.
    """
    from memlm.evaluation.plots import draw_plots
    from memlm.evaluation.report import render_report

    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".evaluation-", dir=folder))
    try:
        light, dark = draw_plots(results), draw_plots(results, dark=True)
        for name, image in light.items():
            (made / name).write_bytes(image)
        (made / "report.html").write_text(render_report(results, light, dark), encoding="utf-8")
        names = [*light, "report.html", RESULTS]
        (made / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for name in names:
            (made / name).replace(folder / name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
