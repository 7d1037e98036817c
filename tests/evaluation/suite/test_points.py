import pytest

from memlm.evaluation.suite.points import make_points


def cell(rate, seed, loss, score, error=None, memory="a"):
    failed = error is not None
    return {
        "task": "t",
        "memory": memory,
        "width": 8,
        "learning_rate": rate,
        "seed": seed,
        "parameters": 10,
        "flops_per_token": 20,
        "state_bytes": {} if failed else {"4": 64},
        "memory_state_bytes": {} if failed else {"4": 32},
        "scores": {} if failed else {"parity": {"4": {"on": score}}},
        "measures": {} if failed else {"parity": {"4": {"on": {"exact": score / 2}}}},
        "held_out": {} if failed else {"bits": 9.0, "answer_bits": loss},
        "steps": 10 + seed,
        "seconds": 1.5,
        "error": error,
    }


def test_the_rate_with_the_lowest_mean_loss_and_the_spread_over_its_seeds():
    cells = [
        *(cell(0.1, seed, loss, score) for seed, loss, score in ((0, 1.0, 0.2), (1, 5.0, 0.9))),
        *(cell(0.01, seed, loss, score) for seed, loss, score in ((0, 2.0, 0.5), (1, 3.0, 0.75))),
    ]
    (point,) = make_points(cells)
    assert point["learning_rate"] == 0.01  # 2.5 against 3.0, though a seed of the other is best
    spread = {"mean": 0.625, "low": 0.5, "high": 0.75, "values": [0.5, 0.75]}
    assert point["scores"] == {"parity": {"4": {"on": spread}}}
    assert point["measures"] == {"parity": {"4": {"on": {"exact": 0.3125}}}}
    assert (point["seeds"], point["steps"], point["seconds"]) == ([0, 1], 10.5, 3.0)
    assert point["state_bytes"] == {"4": 64}
    assert point["error"] is None


def test_ties_go_to_the_larger_rate():
    (point,) = make_points([cell(0.01, 0, 2.0, 0.5), cell(0.1, 0, 2.0, 0.6)])
    assert point["learning_rate"] == 0.1


def test_a_rate_at_which_a_seed_diverged_is_taken_only_where_no_other_is_left():
    diverged = [cell(0.1, 0, 0.1, 0.9), cell(0.1, 1, 0, 0, error="not finite")]
    fine = [cell(0.01, seed, 3.0, 0.5) for seed in (0, 1)]
    (point,) = make_points([*diverged, *fine])
    assert point["learning_rate"] == 0.01
    (point,) = make_points(diverged)
    assert (point["learning_rate"], point["seeds"]) == (0.1, [0])
    assert point["scores"]["parity"]["4"]["on"]["values"] == [0.9]
    (point,) = make_points(diverged[1:])
    assert (point["scores"], point["error"]) == ({}, "not finite")


def test_models_keep_their_order_and_unknown_numbers_are_left_out_of_means():
    cells = [cell(0.1, 0, 1.0, 0.5, memory="b"), cell(0.1, 0, None, 0.5), cell(0.1, 1, 1.0, 0.7)]
    cells[1]["scores"]["parity"]["4"]["on"] = None
    points = make_points(cells)
    assert [point["memory"] for point in points] == ["b", "a"]
    found = points[1]["scores"]["parity"]["4"]["on"]
    assert found == {"mean": 0.7, "low": 0.7, "high": 0.7, "values": [None, 0.7]}
    # Without answers the losses of all targets choose.
    cells = [cell(0.1, 0, 1.0, 0.5), cell(0.01, 0, 1.0, 0.5)]
    for own, loss in zip(cells, (2.0, 1.0), strict=True):
        own["held_out"] = {"bits": loss}
    assert make_points(cells)[0]["learning_rate"] == pytest.approx(0.01)
