"""Prints what the law suite did: memories x laws, cases drawn, passed or not.

Hooks of tests/conftest.py: where several processes share the tests, the one that reports loads no
other conftest.
"""

from collections import defaultdict

_outcomes = defaultdict(dict)  # case -> law -> (examples, passed)


def pytest_runtest_logreport(report):
    """Collect the examples that a law was tried on."""
    for name, value in report.user_properties:
        if report.when == "call" and name == "law":
            case, law, examples = value
            _outcomes[case][law] = (examples, report.passed)


def pytest_terminal_summary(terminalreporter):
    """The table, if any law was tried."""
    if not _outcomes:
        return
    laws = list(dict.fromkeys(law for row in _outcomes.values() for law in row))
    width = max(map(len, _outcomes))
    terminalreporter.section("laws: cases drawn per memory and law (! = broken)")
    terminalreporter.line(" " * width + "".join(f"  {law}" for law in laws))
    for case, row in sorted(_outcomes.items()):
        cells = [
            "-" if law not in row else f"{row[law][0]}{'' if row[law][1] else '!'}" for law in laws
        ]
        line = "".join(f"  {cell:>{len(law)}}" for cell, law in zip(cells, laws, strict=True))
        terminalreporter.line(f"{case:<{width}}{line}")
    results = [result for row in _outcomes.values() for result in row.values()]
    broken = sum(not passed for _, passed in results)
    terminalreporter.line(
        f"{len(_outcomes)} modules x {len(laws)} laws, "
        f"{sum(examples for examples, _ in results)} cases: "
        + (f"{broken} broken" if broken else "all hold")
    )
