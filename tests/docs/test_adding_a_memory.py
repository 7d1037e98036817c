"""The memory in docs/adding_a_memory.md, taken out of the text, obeys every law."""

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from memlm.memory import base, memory_class
from tests.memory.contract import LAWS, Case, Spec
from tests.memory.test_laws import check

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_memory.md"


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    """The page's memory, known for as long as the tests of this file run."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    source, spec = blocks
    module = types.ModuleType("memory_of_the_page")
    # dataclasses look their module up by name.
    sys.modules[module.__name__] = module
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    ((name, (spec,)),) = eval(f"{{{spec}}}", {"Spec": Spec}).items()
    yield Case(name, "memory", spec)
    del base._MEMORIES[name], sys.modules[module.__name__]


@pytest.mark.parametrize("law", LAWS)
def test_the_memory_of_the_page_obeys(law: str, case: Case) -> None:
    assert memory_class(case.memory).__module__ == "memory_of_the_page"
    check(law, case, [], 1)
