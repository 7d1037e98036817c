"""Random projections: against loops, learnable from the sequence alone, few tasks, measures."""

from statistics import NormalDist

import numpy as np
import pytest

from memlm.data.synthetic.random_projection import RandomProjection
from memlm.errors import UserError


def draw(task: RandomProjection, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [shots, dimensions] and answers [shots]; labels stand where they have to."""
    example = task.example(length, np.random.default_rng(seed))
    size = task.dimensions + 1
    rows = example.input_ids.reshape(-1, size)
    labels = example.labels.reshape(-1, size)
    assert len(rows) == length // size
    assert (labels[:, -2] == rows[:, -1]).all()
    assert (np.delete(labels, -2, axis=1) == -100).all()
    assert (rows[:, :-1] < task.levels).all()
    assert (rows[:, -1] >= task.levels).all()
    return rows[:, :-1], rows[:, -1] - task.levels


def test_against_loops() -> None:
    task = RandomProjection(classes=3, dimensions=2, levels=5, noise=0.3, world_seed=4)
    inputs, answers = draw(task, 31, 11)
    centres = np.random.default_rng([4, 0]).standard_normal((3, 16)).tolist()
    for channel in range(16):
        mean = sum(centre[channel] for centre in centres) / 3
        for centre in centres:
            centre[channel] -= mean
    rng = np.random.default_rng(11)
    projection = rng.standard_normal((16, 2)).tolist()
    names = rng.permutation(3).tolist()
    chosen = rng.integers(0, 3, size=10).tolist()
    noise = rng.standard_normal((10, 16)).tolist()
    for shot, kind in enumerate(chosen):
        assert answers[shot] == names[kind]
        for column in range(2):
            weights = [row[column] for row in projection]
            means = [sum(c * w for c, w in zip(one, weights, strict=True)) for one in centres]
            variance = sum(mean**2 for mean in means) / 3 + sum((0.3 * w) ** 2 for w in weights)
            value = means[kind] + sum(
                0.3 * n * w for n, w in zip(noise[shot], weights, strict=True)
            )
            share = NormalDist().cdf(value / variance**0.5)
            assert inputs[shot, column] == int(5 * share)


def test_classes_are_learned_from_the_sequence() -> None:
    task = RandomProjection(classes=4, dimensions=6, levels=16, noise=0.2)
    right, across, shots = 0, 0, 0
    before = draw(task, 350, 99)
    for seed in range(20):
        inputs, answers = draw(task, 350, seed)
        for shot in range(25, 50):
            for known, (places, names) in enumerate(((inputs[:shot], answers[:shot]), before)):
                nearest = np.square(places - inputs[shot]).sum(1).argmin()
                if known == 0:
                    right += names[nearest] == answers[shot]
                else:
                    across += names[nearest] == answers[shot]
            shots += 1
        before = inputs, answers
    # The nearest earlier point of the sequence knows; another sequence's is a guess of four.
    assert right / shots > 0.9
    assert 0.1 < across / shots < 0.4


def mapping(task: RandomProjection, seed: int) -> frozenset:
    """What a sequence without noise says: inputs and classes."""
    inputs, answers = draw(task, 300, seed)
    return frozenset(
        (*row, name) for row, name in zip(inputs.tolist(), answers.tolist(), strict=True)
    )


def test_few_tasks_come_again_and_many_do_not() -> None:
    few = RandomProjection(noise=0.0, tasks=3)
    assert len({mapping(few, seed) for seed in range(40)}) == 3
    assert len({mapping(RandomProjection(noise=0.0), seed) for seed in range(40)}) == 40
    other = RandomProjection(noise=0.0, tasks=3, world_seed=1)
    assert not {mapping(few, s) for s in range(40)} & {mapping(other, s) for s in range(40)}


def test_levels_are_used_alike() -> None:
    task = RandomProjection(classes=64, levels=8)
    inputs = np.concatenate([draw(task, 500, seed)[0] for seed in range(60)])
    shares = np.bincount(inputs.reshape(-1), minlength=8) / inputs.size
    assert shares == pytest.approx(np.full(8, 1 / 8), abs=0.03)


def test_measures_by_hand() -> None:
    task = RandomProjection(dimensions=1)
    sums: dict[str, float] = {}
    # Of seven shots the first is wrong both times, shot 3 in one and shots 6 and 7 in the other.
    for seed, wrong in enumerate(([0, 2], [0, 5, 6])):
        example = task.example(14, np.random.default_rng(seed))
        guesses = example.labels.copy()
        guesses[np.array(wrong) * 2] = 0
        for name, count in task.counts(example, guesses).items():
            sums[name] = sums.get(name, 0.0) + count
    expected = {"shots_1": 0.0, "shots_2": 1.0, "shots_3_4": 3 / 4, "shots_5_8": 4 / 6}
    assert task.measures(sums) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"classes": 1}, 20, "classes must be >= 2, got 1"),
        ({"levels": 1}, 20, "levels must be >= 2, got 1"),
        ({"tasks": -1}, 20, "tasks must be >= 0, got -1"),
        ({"noise": -0.5}, 20, r"noise must be in \[0, 1000\], got -0.5"),
        ({"noise": float("nan")}, 20, r"noise must be in \[0, 1000\], got nan"),
        ({"noise": 1e300}, 20, r"noise must be in \[0, 1000\], got 1e\+300"),
        ({}, 4, "an input and its class are 5 tokens, got 4"),
    ],
)
def test_what_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=f"random_projection: {message}"):
        RandomProjection(**options).check(length)
