"""Training with rows that several processes hold together."""

import pytest

from memlm.errors import UserError
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.retention import checkpoint_path
from memlm.training.setup import check_processes
from tests.training.launching import Job, in_float64, train_in
from tests.training.test_processes import assert_same_weights, losses

WINDOW = {"type": "sliding_attention", "window": 12, "num_heads": 2}
LAYERS = [
    {
        "mixer": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "memory": {"type": "titans", "num_heads": 2, "head_dim": 4, "chunk_size": 8},
        "ffn": "swiglu",
    },
    {
        "mixer": {"type": "retention", "num_heads": 2},
        "memory": {"type": "linear_attention", "num_heads": 2},
        "ffn": {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3},
    },
    {"mixer": WINDOW, "ffn": "swiglu"},
]
TRAIN = {
    "carry_state": True,
    "micro_batch_rows": 1,
    "steps": 4,
    "save_every": 2,
    "evaluation_rows": 2,
}
ASKED = {"tasks": ["needle"], "trials": 2, "lengths": [96]}


def options(corpus, **changed):
    passkey = {"type": "passkey", "digits": [2, 4], "queries": [1, 2], "files": [str(corpus)]}
    sources = [passkey, {"type": "text", "files": [str(corpus)]}]
    return {"model": {"layers": LAYERS}, "data": {"sources": sources}, **TRAIN, **changed}


def records(config):
    return read_metrics(config.output_dir / METRICS_FILE)


def evaluation(config):
    return [r for r in records(config) if r.get("evaluation")][-1]


def test_rows_held_by_two_equal_rows_held_by_one(make_config, corpus):
    one = make_config("one", **options(corpus))
    two = make_config("two", **options(corpus, sequence_parallel=2))
    back = make_config("back", **options(corpus))
    with in_float64():
        Trainer(one).run()
        train_in(2, Job(two), double=True)
        Trainer(back, resume=checkpoint_path(two.output_dir, 2)).run()
    assert losses(two) == pytest.approx(losses(one), abs=1e-9)
    assert losses(back) == pytest.approx(losses(one)[2:], abs=1e-9)
    assert_same_weights(one, two, rtol=0, atol=1e-8)
    mine, theirs = evaluation(two), evaluation(one)
    assert mine.keys() == theirs.keys()
    for name in ("bits", "text_bits", "bits_off"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-9)
    norms = [
        [{k: v for k, v in r.items() if k.endswith("state_norm")} for r in records(config)]
        for config in (two, one)
    ]
    assert any(norms[1])
    for mine, theirs in zip(*norms, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_four_processes_hold_rows_together_or_two_by_two(make_config, corpus):
    one = make_config("one", **options(corpus, evaluate_during=ASKED))
    four = make_config("four", **options(corpus, sequence_parallel=4))
    pairs = make_config("pairs", **options(corpus, sequence_parallel=2, evaluate_during=ASKED))
    sharded = make_config("sharded", **options(corpus, sequence_parallel=2))
    back = make_config("back", **options(corpus, sequence_parallel=2))
    with in_float64():
        Trainer(one).run()
        train_in(4, Job(four), Job(pairs), Job(sharded, sharded=True), double=True)
        train_in(2, Job(back, checkpoint_path(sharded.output_dir, 2)), double=True)
    for other in (four, pairs, sharded):
        assert losses(other) == pytest.approx(losses(one), abs=1e-9)
    assert losses(back) == pytest.approx(losses(one)[2:], abs=1e-9)
    mine, theirs = evaluation(pairs), evaluation(one)
    assert mine["needle/96/on"] == theirs["needle/96/on"]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"sequence_parallel": 3}, "rows of 64 tokens cannot be shared equally by 3 processes"),
        ({"sequence_parallel": 2, "backprop": "replay", "replay_segment": 64}, "whole rows"),
        ({"sequence_parallel": 2, "compile": True}, "is not compiled"),
    ],
)
def test_rows_that_cannot_be_shared(make_config, changed, said):
    with pytest.raises(UserError, match=said):
        make_config(**changed)


def test_processes_that_cannot_be_grouped(make_config):
    config = make_config(sequence_parallel=2)
    with pytest.raises(UserError, match="3 processes cannot be divided into groups of 2"):
        check_processes_as_launched(3, config)


def check_processes_as_launched(count, config):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORLD_SIZE", str(count))
        check_processes(count, config.train)
