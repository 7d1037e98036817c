"""Every law on every registered memory, at every site where it makes sense."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memlm.memory import memory_names, output_memory_names
from tests.memory.contract import LAWS, OUTPUT_SPECS, SPECS, cases

deterministic = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a law names what it drew; shrinking it takes minutes
)


def test_every_memory_is_under_the_law():
    assert sorted(SPECS) == memory_names(), "a memory needs a line in tests/memory/contract.py"
    assert sorted([*OUTPUT_SPECS, "knn_lm"]) == output_memory_names()


CASES = [
    pytest.param(case, marks=[pytest.mark.slow] if case.spec.slow else [], id=str(case))
    for case in cases()
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, case, law_counter):
    @settings(deterministic, max_examples=case.examples)
    @given(data=st.data())
    def holds(data):
        law_counter.append(1)
        LAWS[law](case, data)

    holds()
