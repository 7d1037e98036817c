import itertools

import pytest

from memlm.config import Stage
from memlm.training.schedule import ANSWER_STEPS, CurriculumState, learning_rate_factor


def test_warm_up_is_linear_and_the_cosine_ends_at_its_fraction():
    factors = [learning_rate_factor(step, 110, 10, 0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1.0
    assert factors[59:61] == pytest.approx([0.55, 0.55], abs=0.01)  # half-way down
    assert factors[-1] == pytest.approx(0.1)
    assert all(low < high for high, low in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (5, 5), (5, 10), (2, 1)])
def test_short_runs_have_a_rate(steps, warmup_steps):
    factors = [learning_rate_factor(step, steps, warmup_steps, 0.1) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_stage_ends_at_its_fraction_of_the_steps():
    state, stages = CurriculumState(), [Stage(64, until=0.25), Stage(128, until=0.5), Stage(256)]
    seen = []
    for step in range(1, 9):
        state.advance(stages, step, 8, None)
        seen.append(state.stage)
    assert seen == [0, 1, 1, 2, 2, 2, 2, 2]


def test_solved_stage_ends_after_enough_steps_below_the_bound():
    state, stages = CurriculumState(), [Stage(64, until=0.9, until_answer_bits=1.0), Stage(128)]
    for step in range(ANSWER_STEPS):
        assert not state.advance(stages, step, 1000, 3.0)
    # The average has to fall below the bound: one good step is luck.
    assert not state.advance(stages, 20, 1000, 0.0)
    left = [state.advance(stages, 21 + step, 1000, 0.0) for step in range(ANSWER_STEPS - 1)]
    assert left.index(True) == 4  # 3 * 3.0 + 5 * 0.0 is the first sum above, 2 * 3.0 below 8
    assert state.stage == 1
    assert not state.advance(stages, 40, 1000, 0.0)
