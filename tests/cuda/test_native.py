"""Compiling C++ on first use: the cache, and what happens without a compiler or with a bad one."""

import logging
import os
import subprocess
import sys

import pytest

from memlm.cuda import native
from memlm.cuda.linear_recurrence.native import SOURCE

needs_compiler = pytest.mark.skipif(
    native._compiler() is None, reason="there is no C++ compiler to test with"
)

ANSWER = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C++ file with a header, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    yield path
    native._library.cache_clear()


def libraries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "memlm" / "native").iterdir())


@needs_compiler
def test_what_is_compiled_once_is_loaded_from_then_on(source, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="memlm.cuda.native")
    for _ in range(2):
        assert native.unavailable(source) is None
        assert native.load(source).answer() == 42
        native._library.cache_clear()  # as in another process
    assert [record.getMessage()[:9] for record in caplog.records] == ["compiling"]
    assert len(libraries(tmp_path)) == 1


@needs_compiler
def test_a_changed_header_makes_another_library(source, tmp_path):
    assert native.load(source).answer() == 42
    native._library.cache_clear()
    (source.parent / "answer.h").write_text("#define ANSWER 43\n")
    assert native.load(source).answer() == 43
    assert len(libraries(tmp_path)) == 2


def test_no_compiler(source, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.unavailable(source).startswith("no C++ compiler")
    with pytest.raises(RuntimeError, match="no C.. compiler"):
        native.load(source)


def test_a_compiler_that_does_nothing(source, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "does not compile" in native.unavailable(source)


@needs_compiler
def test_a_source_that_does_not_compile(source, tmp_path):
    source.write_text("int f() { return nothing_of_that_name; }\n")
    reason = native.unavailable(source)
    assert "does not compile" in reason and "nothing_of_that_name" in reason
    assert "\n" not in reason
    assert libraries(tmp_path) == []


@needs_compiler
def test_a_library_that_does_not_load(source):
    source.write_text("int missing_function();\nint here = missing_function();\n")
    assert "missing_function" in native.unavailable(source)


@needs_compiler
def test_a_compiler_that_does_not_know_the_cpu(source, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    command = " ".join(native._compiler())
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{native.NATIVE}*) exit 1;; esac\nexec {command} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert native._compiler() == [str(compiler)]
    assert native.load(source).answer() == 42


@needs_compiler
def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native._cache_folder() is None
    assert native.load(source).answer() == 42


@needs_compiler
def test_two_processes_at_once(source, tmp_path):
    # The file alone, with stand-ins for the two names it takes of the package and of torch, which
    # would take seconds to import.
    program = (
        "import importlib.util, sys, types; from pathlib import Path; "
        "dispatch = types.SimpleNamespace(may_be_chosen=None); "
        "compiler = types.SimpleNamespace(assume_constant_result=lambda function: function); "
        "torch = types.SimpleNamespace(compiler=compiler); "
        "stand_ins = {'memlm': dispatch, 'memlm.cuda.dispatch': dispatch, 'torch': torch}; "
        "sys.modules.update(stand_ins); "
        "spec = importlib.util.spec_from_file_location('native', sys.argv[1]); "
        "native = importlib.util.module_from_spec(spec); spec.loader.exec_module(native); "
        "print(native.load(Path(sys.argv[2])).answer())"
    )
    command = [sys.executable, "-c", program, native.__file__, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in running] == ["42\n", "42\n"]
    assert len(libraries(tmp_path)) == 1


def test_headers_are_part_of_the_key():
    names = {path.name for path in native._sources(SOURCE)}
    assert {"native.cpp", "native_chunks.h", "simd.h"} <= names
    assert all(os.path.exists(path) for path in native._sources(SOURCE))
