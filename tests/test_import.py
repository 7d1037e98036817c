"""What `import memlm` brings along, seen from a fresh process."""

import subprocess
import sys

import pytest

# Used by some functions only; a user may leave them out.
LAZY = ("datasets", "faiss", "flash_attn", "jsonargparse", "matplotlib", "wonderwords")


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """The modules there are after `import memlm` where the lazy ones are not installed."""
    # None in sys.modules makes an import fail as if the package were not installed.
    script = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import memlm; {}"
    check = "assert memlm.MemLMForCausalLM and memlm.memory.memory_names(); print(*sys.modules)"
    command = [sys.executable, "-c", script.format(check), *LAZY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_the_package_imports_without_what_only_some_functions_need(imported) -> None:
    assert "memlm.models.modeling" in imported


def test_kernels_are_imported_on_first_use_only(imported) -> None:
    assert {"memlm.cuda.diagonal_scan", "memlm.cuda.short_convolution"} <= set(imported)
    assert [name for name in imported if name.endswith(".triton_kernels")] == []


def test_the_check_above_notices_an_import() -> None:
    script = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import datasets"
    command = [sys.executable, "-c", script, *LAZY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ModuleNotFoundError" in result.stderr
