"""What lets a checkpoint load where nobody imported memlm: a module that imports it."""

from pathlib import Path

from memlm.files import replace_file

STUB_FILE = "modeling_memlm.py"
STUB = """# Read with trust_remote_code=True only: the model is in the installed package memlm.
from memlm import MemLMConfig, MemLMForCausalLM, MemLMModel  # noqa: F401
"""
_MODULE = STUB_FILE.removesuffix(".py")
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.MemLMConfig",
    "AutoModel": f"{_MODULE}.MemLMModel",
    "AutoModelForCausalLM": f"{_MODULE}.MemLMForCausalLM",
}


def write_stub(folder: Path) -> None:
    """Put the module that `AUTO_MAP` names beside a config.json."""
    replace_file(folder / STUB_FILE, STUB)
