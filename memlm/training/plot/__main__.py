"""Loss and metric curves of one or several runs in one picture or page.

python -m memlm.training.plot RUN [RUN ...] [--output FILE.png|FILE.html]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from memlm.cli import folders_and_output, run_entry_point
from memlm.errors import UserError
from memlm.files import replace_file
from memlm.training.plot.draw import draw_sheet
from memlm.training.plot.page import render_page
from memlm.training.plot.panels import panels
from memlm.training.plot.runs import Run, read_runs

USAGE = "python -m memlm.training.plot RUN [RUN ...] [--output FILE.png|FILE.html]"
DEFAULT = "curves.html"
ENDINGS = (".png", ".html")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _plot(list(sys.argv[1:] if argv is None else argv)))


def _plot(words: list[str]) -> None:
    if "--help" in words or "-h" in words:
        print(f"{__doc__.splitlines()[0]}\n\n{USAGE}\n\nWithout --output: {DEFAULT}.")
        return
    folders, output = _parse(words)
    runs = read_runs(folders)
    found, title = panels(runs), _title(runs)
    if not found:
        raise UserError(f"{folders[0]}: its records hold no number that can be drawn")
    if output.suffix == ".png":
        replace_file(output, draw_sheet(found, runs, title))
    else:
        replace_file(output, render_page(found, runs, title))
    print(output)


def _title(runs: list[Run]) -> str:
    return f"Training of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"


def _parse(words: list[str]) -> tuple[list[Path], Path]:
    folders, output = folders_and_output(words, USAGE)
    output = Path(DEFAULT) if output is None else output
    if not folders:
        raise UserError(f"no run folder is given; usage: {USAGE}")
    if output.suffix not in ENDINGS:
        raise UserError(f"--output: {output} must end with {' or '.join(ENDINGS)}")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else f"is in no folder: {output.parent} is missing"
        raise UserError(f"--output: {output} {what}")
    return folders, output


if __name__ == "__main__":
    sys.exit(main())
