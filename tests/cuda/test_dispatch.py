import logging

import pytest

from memlm.cuda.dispatch import VARIABLE, choose
from memlm.errors import UserError


def slow():
    return "reference"


def fast():
    return "eager"


IMPLEMENTATIONS = {"reference": slow, "eager": fast, "triton": "no GPU was found"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_auto_takes_the_fastest_available():
    assert choose("op", IMPLEMENTATIONS) is fast
    assert choose("op", {"reference": slow}) is slow


def test_auto_without_any_implementation():
    with pytest.raises(RuntimeError, match="op has no available implementation"):
        choose("op", {"cuda": "no GPU was found"})


@pytest.mark.parametrize("name, expected", [("reference", slow), ("eager", fast), ("auto", fast)])
def test_the_variable_forces_an_implementation(monkeypatch, name, expected):
    monkeypatch.setenv(VARIABLE, name)
    assert choose("op", IMPLEMENTATIONS) is expected


def test_forced_but_unavailable_names_the_reason(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="triton is unavailable for op: no GPU was found"):
        choose("op", IMPLEMENTATIONS)
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(RuntimeError, match="no such implementation"):
        choose("op", IMPLEMENTATIONS)


def test_unknown_value_names_the_nearest(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eagre")
    with pytest.raises(UserError, match="MEMLM_KERNELS=eagre.*did you mean 'eager'"):
        choose("op", IMPLEMENTATIONS)


def test_auto_logs_once_per_operation(caplog):
    with caplog.at_level(logging.INFO, logger="memlm.cuda.dispatch"):
        choose("logged once", IMPLEMENTATIONS)
        choose("logged once", IMPLEMENTATIONS)
        choose("another", IMPLEMENTATIONS)
    assert [record.message for record in caplog.records] == [
        "logged once: using the eager implementation",
        "another: using the eager implementation",
    ]
