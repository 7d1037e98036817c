"""Several finished evaluations side by side in one report.

python -m memlm.evaluation.report DIR [DIR ...] --output NEWDIR
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from memlm.cli import folders_and_output, run_entry_point
from memlm.errors import UserError
from memlm.evaluation.report import format_table
from memlm.evaluation.report.side_by_side import combine
from memlm.evaluation.results import check_output, write_results

USAGE = "python -m memlm.evaluation.report DIR [DIR ...] --output NEWDIR"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _report(list(sys.argv[1:] if argv is None else argv)))


def _report(words: list[str]) -> None:
    if "--help" in words or "-h" in words:
        print(f"{__doc__.splitlines()[0]}\n\n{USAGE}")
        return
    folders, output = _parse(words)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; choose a new folder")
    check_output(output)
    results = combine(folders)
    write_results(results, output)
    print(format_table(results))
    print(f"\nReport: {output / 'report.html'}")


def _parse(words: list[str]) -> tuple[list[Path], Path]:
    folders, output = folders_and_output(words, USAGE)
    if not folders:
        raise UserError(f"no folder of a finished evaluation; usage: {USAGE}")
    if output is None:
        raise UserError(f"--output is needed: a new folder for the report; usage: {USAGE}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("one folder is given twice; give every evaluation once")
    return folders, output


if __name__ == "__main__":
    sys.exit(main())
