"""What `import memlm` brings along, seen from a fresh process."""

import subprocess
import sys

# Used by some functions only; a user may leave them out.
LAZY = ("datasets", "faiss", "flash_attn", "jsonargparse", "matplotlib", "wonderwords")


def test_the_package_imports_without_what_only_some_functions_need() -> None:
    # None in sys.modules makes an import fail as if the package were not installed.
    script = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import memlm; {}"
    check = "assert memlm.MemLMForCausalLM and memlm.memory.memory_names()"
    command = [sys.executable, "-c", script.format(check), *LAZY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_check_above_notices_an_import() -> None:
    script = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import datasets"
    command = [sys.executable, "-c", script, *LAZY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ModuleNotFoundError" in result.stderr
