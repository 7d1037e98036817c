"""The command line of suites."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from memlm.cli import Parser, run_entry_point
from memlm.errors import UserError
from memlm.evaluation.suite.cells import Cell, make_cells, select
from memlm.evaluation.suite.config import FOLDER, load_suite
from memlm.yaml_tree import read_yaml

DESCRIPTION = """Train models with different memories for a task, evaluate them, and leave one table
and one plot. Started again with the same output folder, a suite that was stopped goes on."""
PROGRAM = "python -m memlm.evaluation.suite"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite as the command line says; returns the exit code.

    2 for a mistake of the user, 1 when the process of a cell failed, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry_point(lambda: _main(words))


def _main(words: list[str]) -> int:
    command = shlex.join([*PROGRAM.split(), *words])
    name = words[0] if words and not words[0].startswith("-") else None
    options, overrides = _parser().parse_known_args(words[name is not None :])
    if options.list:
        print(list_suites())
        return 0
    if name is None:
        raise UserError(f"usage: {PROGRAM} NAME [--preset PRESET]; --list shows what there is")
    suite = load_suite(name, options.preset, overrides)
    cells = select(make_cells(suite), options.only)
    if options.dry_run:
        print(describe_grid(cells))
        return 0
    return _run(suite, cells, options, command)


def _run(suite, cells: Sequence[Cell], options, command: str) -> int:
    from memlm.evaluation.suite.runner import PLOT, TABLE, run_suite
    from memlm.evaluation.suite.workers import Workers

    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes: must be at least 1, got {options.processes}")
    folder = Path(options.output or Path("runs/suites") / "-".join(_label(suite)))
    try:
        results, missing = run_suite(
            suite, cells, folder, Workers(options.processes), command, options.keep_runs
        )
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are kept, go on with: {command}", file=sys.stderr)
        return 130
    if results is not None:
        table = (folder / TABLE).read_text(encoding="utf-8")
        print(table)
        print(f"{folder / TABLE}\n{folder / PLOT}")
        if options.document is not None and not missing:
            _document(options.document, suite, results, folder)
    if missing:
        print(
            f"{len(missing)} of {len(cells)} cells failed ({', '.join(missing)}); the same "
            "command tries them again",
            file=sys.stderr,
        )
    return 1 if missing else 0


def _document(path: Path, suite, results, folder: Path) -> None:
    from memlm.evaluation.suite.document import write_section
    from memlm.evaluation.suite.runner import PLOT, TABLE

    table = (folder / TABLE).read_text(encoding="utf-8").rstrip("\n")
    picture = (folder / PLOT).read_bytes()
    write_section(path, suite.name, suite.preset, results, table, picture)


def _label(suite) -> list[str]:
    return [suite.name] if suite.preset is None else [suite.name, suite.preset]


def list_suites() -> str:
    """A line for every suite of configs/suites: name, presets, title and question."""
    lines = []
    for path in sorted(FOLDER.glob("*.yaml")):
        tree = read_yaml(path)
        presets = ", ".join(tree.get("presets") or {}) or "none"
        lines.append(f"{path.stem}  {tree.get('title')}: {tree.get('question')}")
        lines.append(f"    memories: {', '.join(tree.get('memories') or {})}; presets: {presets}")
    if not lines:
        raise UserError(f"{FOLDER}: there are no suites; start it where the project's configs are")
    return "\n".join(lines)


def describe_grid(cells: Sequence[Cell]) -> str:
    """The cells in a table."""
    rows = [("cell", "parameters", "flops/token", "steps", "tokens/step", "learning rate")]
    for cell in cells:
        train = cell.config.train
        sizes = [
            "?" if size is None else f"{size:,}" for size in (cell.parameters, cell.flops_per_token)
        ]
        steps = (f"{train.steps:,}", f"{train.tokens_per_step:,}", f"{cell.learning_rate:g}")
        rows.append((cell.key, *sizes, *steps))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values in rows:
        right = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join([*lines, f"{len(cells)} cells"])


def _parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} NAME",
        description=DESCRIPTION,
        epilog="NAME is a file of configs/suites without .yaml, or the path of one. Every key of "
        "it can be given, as in --base.train.steps 100 or --seeds [0].",
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="show the suites")
    parser.add_argument("--preset", metavar="PRESET", help="an entry of the file's presets")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: runs/suites/NAME-PRESET"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="cells that are trained at a time (default: one per GPU, or per CPU core)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="only these cells; AXIS is task, memory, width, learning_rate or seed (repeatable)",
    )
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="put table and plot into this Markdown file"
    )
    parser.add_argument(
        "--keep_runs", action="store_true", help="keep models and curves of finished cells"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells without training them"
    )
    return parser
