"""Reports of suites: a table and a picture of each kind."""

from types import ModuleType
from typing import Any

from memlm.errors import UserError, nearest
from memlm.evaluation.suite.reports import capacity, frontier, lengths, matrix
from memlm.evaluation.suite.reports.drawing import paper_style, save
from memlm.evaluation.suite.reports.reading import notes
from memlm.specification import build_config

KINDS: dict[str, ModuleType] = {
    "frontier": frontier,
    "lengths": lengths,
    "matrix": matrix,
    "capacity": capacity,
}


def check_report(report: dict[str, Any]) -> None:
    """Refuse a report that cannot be made.

    Raises:
        UserError: for an unknown kind, an unknown option, or a value that is not valid.
    """
    _parse(report)


def make_table(results: dict[str, Any]) -> str:
    """The table of results.json in GitHub's Markdown, with notes on what failed below it.

    Raises:
        UserError: where the report asks for what the results do not hold.
    """
    module, options = _parse(results["report"])
    table = module.make_table(results, options)
    remarks = notes(results, module.shown_points(results, options))
    return "\n\n".join([table, *(["\n".join(remarks)] if remarks else [])])


def draw_plot(results: dict[str, Any]) -> bytes:
    """The picture of results.json, a PNG on white.

    Raises:
        UserError: where the report asks for what the results do not hold.
    """
    module, options = _parse(results["report"])
    with paper_style():
        return save(module.draw(results, options))


def _parse(report: dict[str, Any]) -> tuple[ModuleType, Any]:
    kind = report.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(str(kind), KINDS) or f" (valid: {', '.join(KINDS)})"
        raise UserError(f"report.kind: unknown kind {kind!r}{hint}")
    module = KINDS[kind]
    values = {key: value for key, value in report.items() if key != "kind"}
    options = build_config(module.Options, values, "report")
    options.check()
    return module, options
