"""DeepSpeed ZeRO-2 on two processes has the losses and weights of one process."""

import importlib.util

import pytest

from memlm.training import Trainer, trainer
from memlm.training.retention import checkpoint_path
from tests.training.launching import Job, train_in_two
from tests.training.test_processes import assert_same_weights, losses

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
ATTENTION = {"type": "sliding_attention", "window": 16, "num_heads": 2}
TITANS = {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 16}
TABLE = {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4}
LAYERS = [
    {"mixer": ATTENTION, "memory": TITANS, "ffn": TABLE},
    {"mixer": "min_gru", "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8}},
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing its curves takes a run as long as all the rest."""
    monkeypatch.setattr(trainer, "plot_run", lambda *_: None)


def test_two_processes_have_the_numbers_of_one(make_config):
    options = {"model": {"layers": LAYERS}, "steps": 4, "carry_state": True, "clip_norm": 0.1}
    options |= {"micro_batch_rows": 1, "save_every": 2, "value_optimizer": "lazy_adam"}
    names = ("one", "two", "one after two", "two after one")
    one, two, one_after, two_after = (make_config(name, **options) for name in names)
    Trainer(one).run()
    half = checkpoint_path(one.output_dir, 2)
    train_in_two(Job(two, zero2=True), Job(two_after, half, zero2=True))
    Trainer(one_after, checkpoint_path(two.output_dir, 2)).run()
    for other, steps in ((two, 4), (two_after, 2), (one_after, 2)):
        assert losses(other) == pytest.approx(losses(one)[-steps:], rel=1e-5)
        assert_same_weights(other, one, **CLOSE)
