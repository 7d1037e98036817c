import logging

import pytest
import torch

from memlm.cuda import dispatch
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


def test_one_operation_is_forced_and_the_others_left_alone(monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto,op=reference")
    assert choose("op", IMPLEMENTATIONS) is slow
    assert choose("another", IMPLEMENTATIONS) is fast
    monkeypatch.setenv(VARIABLE, "reference, op=eager")
    assert choose("op", IMPLEMENTATIONS) is fast
    assert choose("another", IMPLEMENTATIONS) is slow


@pytest.fixture
def hopper(monkeypatch):
    """As if a Hopper card were there; returns a function that sets Triton's version."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def with_triton(version):
        monkeypatch.setattr("triton.__version__", version)
        dispatch.triton_version.cache_clear()

    yield with_triton
    dispatch.triton_version.cache_clear()


KERNELS = {"eager": fast, "triton": slow}
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("version", ["3.4.0", "3.6", "3.7.0rc2"])
def test_a_triton_known_for_wrong_gradients_is_passed_over(hopper, monkeypatch, caplog, version):
    hopper(version)
    dispatch._logged.clear()
    assert choose("linear_recurrence", KERNELS, CUDA) is fast
    assert "known for wrong gradients" in caplog.text
    assert choose("short_convolution", KERNELS, CUDA) is slow
    monkeypatch.setenv(VARIABLE, "auto,linear_recurrence=triton")
    assert choose("linear_recurrence", KERNELS, CUDA) is slow


@pytest.mark.parametrize("version", ["3.3.1", "3.7.1", "4.0"])
def test_other_versions_of_triton_are_trusted(hopper, version):
    hopper(version)
    assert choose("linear_recurrence", KERNELS, CUDA) is slow


def test_an_old_card_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="compute capability 7.5, the kernels need 8.0"):
        choose("op", KERNELS, CUDA)
