"""Facts as an evaluation: bits of a model whose probabilities are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from memlm.data import load_tokenizer
from memlm.data.synthetic.facts import Facts
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import SyntheticOptions

OPTIONS = {"subjects": 9, "relations": 2, "objects": 4, "world_seed": 3}


class Knower(nn.Module):
    """Gives the right object of the facts of one relation probability 1/2, else 1/4 to each."""

    device = torch.device("cpu")
    max_context = None

    def __init__(self, vocabulary: int):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        task = Facts(**OPTIONS)
        whole = task.example(3 * task.facts, np.random.default_rng(0))
        facts = whole.input_ids.reshape(-1, 3).tolist()
        self.table = dict(zip(map(tuple, facts), whole.labels[2::3].tolist(), strict=True))

    def memories(self):
        return {}

    def memory_state_names(self):
        return []

    def forward(self, input_ids, memory_states=None, **_):
        logits = torch.full((*input_ids.shape, self.config.vocab_size), -math.inf)
        logits[..., 5:9] = 0.0  # three symbols and two relations stand before the objects
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(2, len(ids), 3):
                answer = self.table[tuple(ids[place - 2 : place + 1])]
                if ids[place] == 3:
                    logits[row, place, answer] = math.log(3.0)
        return SimpleNamespace(logits=logits, memory_states={})


def test_bits_of_a_model_that_half_knows() -> None:
    tokenizer = load_tokenizer("integers:9")
    synthetic = SyntheticOptions(lengths=[54], rows=4, options={"facts": OPTIONS})
    config = EvaluationConfig(tasks=["facts"], synthetic=synthetic, batch_size=2)
    model = Knower(len(tokenizer))
    task = evaluate(model, tokenizer, config, progress=False)["runs"][0]["tasks"]["facts"]
    found = task["measures"]["54"]["on"]
    # 54 tokens are the whole table: half of its facts cost 1 bit, the others 2 bits.
    assert found["facts"] == 18
    assert found["loss_bits"] == pytest.approx(1.5)
    assert found["bits"] == pytest.approx(18 * 0.5)
    assert found["accuracy"] == pytest.approx(task["scores"]["54"]["on"]["value"])
    assert 0.5 <= found["accuracy"] < 1
