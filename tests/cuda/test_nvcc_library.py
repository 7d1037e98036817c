"""Compiling CUDA C++ on first use, and a table's gather in it; on machines without a GPU."""

import ctypes

import pytest
import torch

from memlm.cuda import nvcc_library, weighted_bag
from memlm.cuda.dispatch import VARIABLE, compiling_for
from memlm.cuda.weighted_bag import device, refusal

CPU = torch.device("cpu")
needs_nvcc = pytest.mark.skipif(nvcc_library.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A CUDA C++ file and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cu"
    path.write_text(
        "__global__ void kernel(int *x) { *x = 42; }\n"
        'extern "C" int answer() { kernel<<<1, 1>>>(nullptr); return 42; }\n'
    )
    nvcc_library._library.cache_clear()
    return path


def libraries(tmp_path):
    return list((tmp_path / "cache" / "memlm" / "native").iterdir())


@needs_nvcc
def test_a_library_for_each_card(source, tmp_path):
    for target, count in ((80, 1), (90, 2), (90, 2)):
        with compiling_for(target):
            assert nvcc_library.unavailable(source, CPU) is None
            assert isinstance(nvcc_library.load(source, CPU), ctypes.CDLL)
        assert len(libraries(tmp_path)) == count
        nvcc_library._library.cache_clear()  # as in another process


@needs_nvcc
def test_a_source_that_does_not_compile(source, tmp_path):
    source.write_text("__global__ void kernel() { nothing_of_that_name(); }\n")
    reason = nvcc_library.unavailable(source, CPU)
    assert "does not compile" in reason and "nothing_of_that_name" in reason
    assert libraries(tmp_path) == []


def test_no_nvcc(source, tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc_library, "nvcc", lambda: None)
    assert "no CUDA compiler" in nvcc_library.unavailable(source, CPU)
    with pytest.raises(RuntimeError, match="no CUDA compiler"):
        nvcc_library.load(source, CPU)


def test_nvcc_is_looked_for_in_cuda_home(tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc_library.nvcc() == str(compiler)


def test_nothing_is_compiled_for_what_another_is_forced_on(source, monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto,weighted_bag=triton")
    assert "forced" in nvcc_library.refusal("weighted_bag", source, CPU)


def test_a_table_on_the_cpu_is_refused(monkeypatch):
    assert "the table is on cpu" in refusal("cuda", torch.empty(2, 3))
    monkeypatch.setenv(VARIABLE, "auto,weighted_bag=cuda")
    with pytest.raises(RuntimeError, match="cuda is unavailable for weighted_bag"):
        weighted_bag(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), torch.ones(2, 3))


def test_it_is_chosen_where_it_is_forced_or_was_faster(monkeypatch):
    class Table:
        device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (4, 1024)

        def __len__(self):
            return 4

    monkeypatch.setattr(device, "capability", lambda _: 90)
    monkeypatch.setattr(device, "triton_unavailable", lambda _: None)
    monkeypatch.setattr(nvcc_library, "unavailable", lambda *_: None)
    assert "not measured to be faster" in refusal("cuda", Table())
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "auto,weighted_bag=cuda")
        assert refusal("cuda", Table()) is None
    monkeypatch.setattr(device, "FASTER_IN_CUDA", {(90, torch.bfloat16, 1024)})
    assert refusal("cuda", Table()) is None


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel would run")
def test_the_gather_says_why_it_cannot_run():
    library = nvcc_library.load(device.SOURCE, CPU)
    library.memlm_bag.restype = ctypes.c_char_p
    nothing = [ctypes.c_void_p(None)] * 6
    one = ctypes.c_longlong(1)
    failure = library.memlm_bag(4, 0, *nothing, one, 1, one, 132, 0, ctypes.c_void_p(None))
    assert b"CUDA" in failure
