"""Counts the examples that each law is tried on, for law_report.py."""

import pytest


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
