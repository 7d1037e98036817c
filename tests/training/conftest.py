import random

import pytest
from accelerate.state import AcceleratorState

from memlm.config import RunConfig, TrainConfig
from memlm.data import DataConfig
from memlm.training import trainer

LAYERS = [
    {
        "repeat": 2,
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "ffn": "swiglu",
    }
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files in a few words, so that a loss can fall at once."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["memory", "reads", "the", "state", "and", "writes", "again", "slowly"]
    for index in range(40):
        text = " ".join(rng.choice(words) for _ in range(400))
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture
def make_config(corpus, tmp_path):
    """`make_config(name, **train)`: a tiny run in tmp_path/name."""

    def make(name="run", model=None, data=None, **train):
        options = {
            "steps": 6,
            "length": 64,
            "tokens_per_step": 256,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "log_every": 1,
            "evaluation_rows": 0,
            "save_every": 0,
        }
        options.update(train, output_dir=str(tmp_path / name))
        source = {"type": "text", "files": [str(corpus)]}
        return RunConfig(
            model={"hidden_size": 16, "intermediate_size": 32, "layers": LAYERS} | (model or {}),
            data=DataConfig(**({"sources": [source]} | (data or {}))),
            train=TrainConfig(**options),
        )

    return make


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing its curves takes a tiny run as long as all the rest; test_usage.py has them drawn."""
    monkeypatch.setattr(trainer, "plot_run", lambda *_: None)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state, the precision included, for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
