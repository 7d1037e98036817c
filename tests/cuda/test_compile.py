"""Every kernel is compiled for the cards it is meant for, on a machine that has none of them."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memlm

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.name for path in (Path(memlm.__file__).parent / "cuda").rglob("*.cu"))
CAPABILITIES = (80, 90)  # sm_80, sm_90a


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    """What `compile_all --quick` writes, from a process without Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    output = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["benchmarks.compile_all", "--quick", "--processes", "1", "--output", output]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    # The table is worth reading where nothing failed, too.
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{done.stdout}")
    assert done.returncode in (0, 1), done.stderr
    (path,) = output.glob("triton-*.json")
    return json.loads(path.read_text())


def test_no_kernel_spills_or_exceeds_its_card(compiled):
    faulty = [one for one in compiled["kernels"] if one["faults"]]
    assert [f"{one['kernel']} sm_{one['capability']}: {one['faults']}" for one in faulty] == []


def test_another_length_compiles_nothing_anew(compiled):
    assert compiled["recompiled"] == {}


def test_every_kernel_is_compiled_for_every_card(compiled):
    kernels = set()
    for path in (ROOT / "memlm" / "cuda").rglob("*.py"):
        pattern = r"^@triton\.jit(?:\(.*?\))?\ndef (\w+_kernel)\("
        names = re.findall(pattern, path.read_text(), re.M | re.S)
        kernels |= {(path.parent.name, name) for name in names}
    assert kernels
    # A specimen's first word is its operation.
    found = {
        (one["specimen"].split()[0], one["kernel"], one["capability"])
        for one in compiled["kernels"]
    }
    assert {(*kernel, sm) for kernel in kernels for sm in (80, 90, 100)} <= found


def compile_cuda(path, capability):
    nvcc = pytest.importorskip("benchmarks.nvcc", reason="triton is not installed")
    if nvcc.nvcc() is None:
        pytest.skip("nvcc is not installed")
    return nvcc.compile_cuda(path, capability)


def test_cuda_sources(compiled):
    """Their faults are those of the first test."""
    if compiled["nvcc"] == "not installed":
        pytest.skip("nvcc is not installed")
    found = {(one["specimen"], one["capability"]) for one in compiled["kernels"]}
    assert SOURCES and set(itertools.product(SOURCES, CAPABILITIES)) <= found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_nvcc_tells_of_a_kernel(tmp_path, capability):
    source = tmp_path / "two.cu"
    source.write_text(
        """
        extern "C" __global__ void plain(float *x) { x[threadIdx.x] *= 2; }
        extern "C" __global__ void sharing(float *x) {
            __shared__ float seen[256];
            seen[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = seen[255 - threadIdx.x];
        }
        """
    )
    kernels = {one.kernel: one for one in compile_cuda(source, capability)}
    assert kernels["plain"].shared == 0 and kernels["sharing"].shared == 1024
    for one in kernels.values():
        assert one.registers > 0 and one.capability == capability and not one.faults(False)


def test_what_nvcc_refuses(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken( {")
    with pytest.raises(RuntimeError, match="nvcc refuses .*broken.cu"):
        compile_cuda(source, 80)
