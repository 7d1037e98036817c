"""Prints what the law suite did: memories x laws, cases drawn, passed or not."""

from collections import defaultdict

import pytest

_outcomes = defaultdict(dict)  # case -> law -> (examples, passed)


@pytest.fixture
def law_counter(request):
    """A list that grows by one item for every example drawn."""
    request.node.law_examples = []
    return request.node.law_examples


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call" and hasattr(item, "law_examples"):
        case, law = item.callspec.params["case"], item.callspec.params["law"]
        # Travels with the report from the process that ran the test.
        item.user_properties.append(("law", (str(case), law, len(item.law_examples))))
    yield


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if report.when == "call" and name == "law":
            case, law, examples = value
            _outcomes[case][law] = (examples, report.passed)


def pytest_terminal_summary(terminalreporter):
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
