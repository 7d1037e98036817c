"""Every law on every registered memory, at every site where it makes sense."""

import itertools

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
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


# Other sites and laws run the same lines of the memory, in a third less time where none is counted.
COUNTED = ("off", "fork", "reference", "read-only", "padding", "beams", "packed")


def examined():
    """Every law on every case."""
    found = []
    for case, law in itertools.product(cases(), LAWS):
        counted = law in COUNTED and case.site == case.spec.sites[0]
        marks = [pytest.mark.slow] * case.spec.slow + [pytest.mark.no_cover] * (not counted)
        found.append(pytest.param(law, case, marks=marks, id=f"{law}-{case}"))
    return found


def check(law, case, counter, examples):
    """Hypothesis starts with the simplest draw; a single one is any other, which finds more.

    law: a name in LAWS, or the function. counter: a list that grows with every draw.
    """
    law = LAWS.get(law, law)

    @settings(deterministic, max_examples=examples)
    @given(data=st.data())
    def holds(data):
        if examples == 1:
            assume(data.draw(st.booleans(), label="not the simplest"))
        counter.append(1)
        law(case, data)

    holds()


@pytest.mark.parametrize(("law", "case"), examined())
def test_law(law, case, law_counter):
    check(law, case, law_counter, case.examples)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "case"), examined())
def test_law_on_more_draws(law, case, law_counter):
    check(law, case, law_counter, 8)
