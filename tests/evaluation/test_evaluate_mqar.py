import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import MqarOptions
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class Pairs(MemoryState):
    """values [B, V]: the value that followed each key, 0 = none; last [B]: the last token."""

    values: Tensor
    last: Tensor

    def reset(self, rows: Tensor | None = None) -> "Pairs":
        return Pairs(torch.zeros_like(self.values), torch.zeros_like(self.last))


class Lookup(nn.Module):
    """Answers a key with the value that followed it in the context, the last or the first."""

    config = SimpleNamespace(vocab_size=259)
    device = torch.device("cpu")
    max_context = None

    def __init__(self, keeps_first: bool = False):
        super().__init__()
        self.keeps_first = keeps_first

    def memories(self):
        return {"memory": SimpleNamespace(name="lookup")}

    def memory_state_names(self):
        return ["memory"]

    def forward(self, input_ids, attention_mask=None, memory_states=None, use_memory=True, **_):
        rows, length = input_ids.shape
        state = (memory_states or {}).get("memory") or Pairs(
            torch.zeros(rows, 259, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        )
        values, last = state.values.clone(), state.last.clone()
        logits = torch.zeros(rows, length, 259)
        every = torch.arange(rows)
        for column in range(length):
            token = input_ids[:, column]
            pair = (token >= 128) & (last > 0) & (last < 128)
            if self.keeps_first:
                pair &= values[every, last] == 0
            values[every[pair], last[pair]] = token[pair]
            if use_memory:
                logits[every, column, values[every, token]] = 1.0
            last = token
        return SimpleNamespace(logits=logits, memory_states={"memory": Pairs(values, last)})


def _config(**options):
    mqar = MqarOptions(**({"length": 40, "pairs": [2, 6], "rows": 10} | options))
    return EvaluationConfig(tasks=["mqar"], mqar=mqar, batch_size=4, segment=5)


def test_pairs_are_found_by_the_memory_alone(tokenizer):
    task = _judge(_config(), tokenizer)["mqar"]
    for pairs in ("2", "6"):
        scores = task["scores"][pairs]
        assert scores["on"]["value"] == 1.0
        assert scores["on"]["count"] == 10
        assert scores["on"]["low"] == pytest.approx(0.722, abs=1e-3)
        assert scores["off"]["value"] == scores["reset"]["value"] == 0.0
        # Two rows may hold the same pair by chance.
        assert scores["swapped"]["value"] < 0.1
        assert task["memory_gain"][pairs]["reset"]["value"] == 1.0
    for cost in task["cost"].values():
        assert cost["memory_state_bytes"] == cost["state_bytes"] == 260 * 8
        assert cost["key_value_bytes"] == 0


def test_a_number_of_pairs_counts_once(tokenizer):
    config = _config(pairs=[2, 6, 2])
    task = _judge(config, tokenizer)["mqar"]
    assert list(task["scores"]) == ["2", "6"]
    assert task["cost"]["2"]["tokens"]["read"] == 4 * 10 * 2  # on and off


def _judge(config, tokenizer, **options):
    return evaluate(Lookup(**options), tokenizer, config, progress=False)["runs"][0]["tasks"]


def test_the_last_value_counts(tokenizer):
    config = _config(length=60)
    config.tasks = ["mqar_overwrite"]
    task = _judge(config, tokenizer)["mqar_overwrite"]
    for pairs in ("2", "6"):
        assert task["scores"][pairs]["on"]["value"] == 1.0
        assert task["scores"][pairs]["off"]["value"] == 0.0
    assert task["stale_answers"] == 0.0


def test_the_first_value_is_seen_as_stale(tokenizer):
    config = _config(length=60)
    config.tasks = ["mqar_overwrite"]
    task = _judge(config, tokenizer, keeps_first=True)["mqar_overwrite"]
    assert task["stale_answers"] == 1.0
    assert task["scores"]["6"]["on"]["value"] == pytest.approx(0.5)


def test_pairs_must_fit(tokenizer):
    with pytest.raises(UserError, match="130 pairs need a vocabulary of 262"):
        evaluate(Lookup(), tokenizer, _config(pairs=[130], length=520), progress=False)
