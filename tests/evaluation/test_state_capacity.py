"""How many pairs a state holds: rules against loops, counts against cases done by hand."""

import json

import numpy as np
import pytest
import torch

from memlm.evaluation.state_capacity.main import main
from memlm.evaluation.state_capacity.measure import (
    exact,
    largest,
    measure,
    nearest,
    random_units,
    share_recalled,
)
from memlm.evaluation.state_capacity.rules import RULES


def pairs(count: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    keys, values = (random_units(count, channels, 1, 5, kind)[0].numpy() for kind in (0, 1))
    return keys.astype(np.float64), values.astype(np.float64)


def read_by(name: str, keys: np.ndarray, values: np.ndarray, step_size: float = 1.0) -> np.ndarray:
    tensors = (torch.from_numpy(one)[None] for one in (keys, values))
    return RULES[name].store_and_read(*tensors, step_size)[0].numpy()


@pytest.mark.parametrize("name", ["additive", "retention", "delta", "linear_attention"])
def test_matrix_rules_are_those_of_a_loop(name):
    keys, values = pairs(37, 8)
    wide = keys * 8**0.5
    features = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
    used = features if name == "linear_attention" else keys
    state, weight = np.zeros((8, 8)), np.zeros(8)
    for k, v in zip(used, values, strict=True):
        if name == "retention":
            state *= 31 / 32
        error = v - state.T @ k if name == "delta" else v
        state += np.outer(k, error)
        weight += k
    expected = used @ state
    if name == "linear_attention":
        expected /= (used @ weight)[:, None]
    np.testing.assert_allclose(read_by(name, keys, values), expected, atol=1e-5)


def test_a_step_of_titans_descends_on_the_squared_error():
    keys, values = pairs(1, 4)
    # d/dM ||k M - v||^2 at zero is -2 k v^T, so a step of 0.2 leaves 0.4 of the value.
    np.testing.assert_allclose(read_by("titans_1", keys, values, 0.2), 0.4 * values, atol=1e-6)


def test_a_chunk_of_titans_takes_its_gradients_at_the_same_weights():
    keys, values = pairs(40, 8)
    state = np.zeros((8, 8))
    for start in range(0, 40, 16):
        k, v = keys[start : start + 16], values[start : start + 16]
        state = state - 0.1 * 2 * k.T @ (k @ state - v)
    np.testing.assert_allclose(read_by("titans_1", keys, values, 0.1), keys @ state, atol=1e-5)


def test_a_deep_memory_of_titans_comes_nearer_to_the_value_it_is_shown():
    key, value = (one.repeat(48, axis=0) for one in pairs(1, 8))
    value = value * 8**0.5
    missed = [np.square(read_by("titans_2", key, value, step) - value)[0].sum()
              for step in (0.0, 0.01)]  # fmt: skip
    assert missed[1] < 0.5 * missed[0]


def test_kept_pairs_are_the_newest_half_as_many_as_channels():
    keys, values = pairs(10, 8)
    read = read_by("knn_cache", keys, values)
    np.testing.assert_array_equal(read[-4:], values[-4:])
    kept = [int(np.argmax(keys[-4:] @ key)) for key in keys[:6]]
    np.testing.assert_array_equal(read[:6], values[-4:][kept])


def test_orthogonal_keys_are_held_without_error_as_many_as_there_are_channels():
    values = pairs(16, 16)[1]
    for name in ("additive", "delta"):
        np.testing.assert_allclose(read_by(name, np.eye(16), values), values, atol=1e-6)


def test_bytes_are_those_of_the_state():
    found = {name: rule.state_bytes(16) for name, rule in RULES.items()}
    matrix = 16 * 16 * 4
    deep = 2 * 16 * 64 * 4
    assert found == {
        "linear_attention": matrix + 16 * 4,
        "retention": matrix,
        "additive": matrix,
        "delta": matrix,
        # Anchor, weights and momentum; the position in the chunk and a mark.
        "titans_1": 3 * matrix + 8 + 1,
        "titans_2": 3 * deep + 8 + 1,
        "knn_cache": matrix,
    }


def test_what_counts_as_recalled():
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    read = torch.tensor([[[0.6, 0.5], [0.9, 0.1]]])
    assert nearest(read, values).tolist() == [[True, False]]
    assert nearest(read, values, torch.tensor([[[0.8, 0.6]]])).tolist() == [[False, False]]
    # Cosines 0.6 / sqrt(0.61) = 0.77 and 0.1 / sqrt(0.82) = 0.11; then 0.95.
    assert exact(read, values).tolist() == [[False, False]]
    assert exact(torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]), values).tolist() == [[True, True]]
    lost = torch.full((1, 2, 2), torch.nan)
    assert not nearest(lost, values).any() and not exact(lost, values).any()


def test_only_a_rule_that_corrects_reads_the_newer_of_two_values():
    for name, share in (("delta", 1.0), ("additive", 0.6), ("knn_cache", 0.01)):
        found = share_recalled(RULES[name], 64, 8, 1.0, seed=0)
        assert found["nearest"] == 1.0, name
        right = found["rewritten"]
        assert right == share if share == 1.0 else right <= share, name


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_count_that_holds(most):
    asked = []
    assert largest(lambda count: asked.append(count) or count <= most) == most
    assert len(asked) == len(set(asked)) <= 15


def test_a_kept_pair_more_is_a_pair_lost():
    # Of n pairs the newest 10 are kept: 10 of 11 are at least 90 %, 10 of 12 are not.
    found = measure(RULES["knn_cache"], 20, 0.9, seed=0)
    assert found["exact"].pairs == 11
    assert found["exact"].curve[11] == pytest.approx(10 / 11)


def test_each_question_has_the_best_step_size():
    found = measure(RULES["titans_1"], 8, 0.9, seed=1)
    for question, capacity in found.items():
        for step_size in RULES["titans_1"].step_sizes:
            one = largest(
                lambda count, q=question, s=step_size: (
                    share_recalled(RULES["titans_1"], 8, count, s, 1)[q] >= 0.9
                )
            )
            assert one <= capacity.pairs
            if step_size == capacity.step_size:
                assert one == capacity.pairs


def test_the_command_leaves_table_numbers_and_plot(tmp_path, capsys):
    words = ["--rules", "delta", "knn_cache", "--channels", "4", "8", "--output", str(tmp_path)]
    assert main(words) == 0
    results = json.loads((tmp_path / "state_capacity.json").read_text())
    kept = results["rules"][1]["sizes"][1]
    assert kept["channels"] == 8 and kept["state_bytes"] == 256
    assert kept["capacities"]["nearest"]["pairs"] == 4
    assert "| keys and values kept | 8 | 256 B | 4 | 4 | 0 | 64 | - |" in capsys.readouterr().out
    assert (tmp_path / "state_capacity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "delt"], "--rules: unknown rule 'delt'; did you mean 'delta'?"),
        (["--share", "0"], "--share: must be above 0 and at most 1, got 0"),
        (["--channels", "7"], "--channels: must be even and at least 2, got [7]"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
    ],
)
def test_mistakes_are_told_in_a_line(words, message, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
