import itertools

import pytest

from memlm.config import Stage, TrainConfig, load_config
from memlm.errors import UserError
from memlm.training.schedule import ANSWER_STEPS, CurriculumState, learning_rate_factor


def test_warm_up_is_linear_and_the_cosine_ends_at_its_fraction():
    factors = [learning_rate_factor(step, 110, 10, 0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1.0
    assert factors[59:61] == pytest.approx([0.55, 0.55], abs=0.01)  # half-way down
    assert factors[-1] == pytest.approx(0.1)
    assert all(low < high for high, low in itertools.pairwise(factors[10:]))


def test_wsd_is_constant_until_its_decay():
    factors = [learning_rate_factor(step, 110, 10, 0.1, "wsd", 0.2) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10:88] == [1.0] * 78
    # 22 steps as 1 - sqrt between 1 and 0.1; half of the fall is in the first quarter.
    assert factors[88] == pytest.approx(0.1 + 0.9 * (1 - (1 / 22) ** 0.5))
    assert factors[88 + 21] == pytest.approx(0.1)
    assert factors[92] > 0.55 > factors[93]
    assert all(low < high for high, low in itertools.pairwise(factors[87:]))


def test_wsd_of_a_longer_run_repeats_the_steps_before_the_decay():
    short, long = (
        [learning_rate_factor(step, steps, 10, 0.0, "wsd", 0.1) for step in range(90)]
        for steps in (100, 300)
    )
    assert short == long


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (5, 5), (5, 10), (2, 1)])
def test_short_runs_have_a_rate(steps, warmup_steps, schedule):
    for fraction in (0.1, 1.0):
        factors = [
            learning_rate_factor(step, steps, warmup_steps, 0.1, schedule, fraction)
            for step in range(steps)
        ]
        assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_fraction": 0.0}, r"train.decay_fraction: must be above 0 and at most 1, got 0.0"),
        ({"decay_fraction": 1.5}, r"train.decay_fraction: .* got 1.5"),
        ({"decay_fraction": float("nan")}, r"train.decay_fraction: .* got nan"),
        ({"final_learning_rate": -0.1}, r"train.final_learning_rate: must be at least 0, got -0.1"),
        ({"learning_rate": float("nan")}, r"train.learning_rate: must be at least 0, got nan"),
    ],
)
def test_bad_options_of_the_schedule(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_the_config_names_the_schedules(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {schedule: linear}")
    with pytest.raises(UserError, match=r"train.schedule: expected one of cosine, wsd, got 'lin"):
        load_config(path)


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
