"""The command line: measure rules at several sizes, leave a table and a plot."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlm.cli import Parser, run_entry_point
from memlm.errors import UserError, nearest

DESCRIPTION = """Write random pairs of a key and a value into the state of a memory, with the gates
that are best for storing, ask each key again, and find the most pairs of which the wanted share is
recalled. Nothing is trained."""
PROGRAM = "python -m memlm.evaluation.state_capacity"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code, 2 for a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry_point(lambda: _main(words))


def _main(words: list[str]) -> int:
    options = _parser().parse_args(words)
    if not 0 < options.share <= 1:
        raise UserError(f"--share: must be above 0 and at most 1, got {options.share:g}")
    if any(channels < 2 or channels % 2 for channels in options.channels):
        raise UserError(f"--channels: must be even and at least 2, got {options.channels}")
    if options.seed < 0:
        raise UserError(f"--seed: must be at least 0, got {options.seed}")

    from memlm.evaluation.runner import versions
    from memlm.evaluation.state_capacity.report import draw, make_table
    from memlm.evaluation.state_capacity.rules import RULES
    from memlm.files import replace_file

    chosen = options.rules or list(RULES)
    for name in chosen:
        if name not in RULES:
            hint = nearest(name, RULES) or f" (valid: {', '.join(RULES)})"
            raise UserError(f"--rules: unknown rule {name!r}{hint}")
    results = {
        "command": shlex.join([*PROGRAM.split(), *words]),
        "share": options.share,
        "seed": options.seed,
        "versions": versions(),
        "rules": [_measure(name, options) for name in dict.fromkeys(chosen)],
    }
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    table = make_table(results)
    text = json.dumps(results, indent=1) + "\n"
    replace_file(folder / "state_capacity.json", text)
    replace_file(folder / "state_capacity.md", table + "\n")
    replace_file(folder / "state_capacity.png", draw(results))
    print(table)
    print(f"{folder / 'state_capacity.md'}\n{folder / 'state_capacity.png'}")
    return 0


def _measure(name: str, options) -> dict[str, Any]:
    from tqdm import tqdm

    from memlm.evaluation.state_capacity.measure import measure
    from memlm.evaluation.state_capacity.rules import RULES

    rule = RULES[name]
    sizes = []
    for channels in tqdm(options.channels, desc=rule.title, unit="size", file=sys.stderr):
        found = measure(rule, channels, options.share, options.seed)
        sizes.append(
            {
                "channels": channels,
                "state_bytes": rule.state_bytes(channels),
                "capacities": {key: dataclasses.asdict(one) for key, one in found.items()},
            }
        )
    steps = list(rule.step_sizes) if len(rule.step_sizes) > 1 else []
    return {"name": name, "title": rule.title, "step_sizes": steps, "sizes": sizes}


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="default: all")
    parser.add_argument(
        "--channels",
        nargs="+",
        type=int,
        default=[16, 32, 64],
        metavar="N",
        help="of keys and values, even (default: 16 32 64)",
    )
    parser.add_argument(
        "--share", type=float, default=0.9, help="of the pairs to be recalled (default: 0.9)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/state_capacity"),
        metavar="DIR",
        help="default: runs/state_capacity",
    )
    return parser
