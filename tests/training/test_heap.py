import ctypes
import types

import pytest

from memlm.training import heap


@pytest.fixture
def calls(monkeypatch):
    """What glibc was told."""
    found = []
    library = types.SimpleNamespace(mallopt=lambda name, value: found.append((name, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in heap._USERS_CHOICE:
        monkeypatch.delenv(name, raising=False)
    return found


def test_glibc_keeps_what_is_freed(calls):
    heap.keep_freed_memory()
    assert calls == [(-3, 32 * 2**20), (-1, 2**30)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"])
def test_settings_of_the_environment_stay(calls, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    heap.keep_freed_memory()
    assert not calls


def test_other_libraries_have_no_such_setting(calls, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    heap.keep_freed_memory()
    assert not calls
