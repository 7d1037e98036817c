"""Overwritten values: only a memory that forgets the first one is always right."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from memlm.data.mqar import MqarRows
from memlm.errors import UserError
from memlm.evaluation.conditions import Pass, Plan
from memlm.evaluation.config import MqarOptions
from memlm.evaluation.costs import Meter, StateBytes
from memlm.evaluation.prompts import Context
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Record, Tools

MakeTools = Callable[..., Tools]
OPTIONS = MqarOptions(length=128, pairs=[8, 16], overwritten=0.25)


class Reader:
    """Knows the pairs of a context, and of two values of a key the one it `keeps`."""

    def __init__(self, keeps: str):
        self.keeps = keeps
        self.plan = Plan((Pass(("on",)), Pass(("changed",), variant="changed")), (), None, ())

    def read_contexts(
        self, contexts: Sequence[Context], use_memory: bool = True
    ) -> list[dict[int, int]]:
        states = []
        for context in contexts:
            pairs = context.read(0, len(context)).reshape(-1, 2).tolist()
            states.append(dict(pairs if self.keeps == "last" else reversed(pairs)))
        return states

    def fork(self, states: list[dict[int, int]]) -> list[dict[int, int]]:
        return states

    def ablate(self, states: list[dict[int, int]], condition: str) -> list[dict[int, int]]:
        return states

    def state_bytes(self, states: list[dict[int, int]]) -> StateBytes:
        return StateBytes(0, 0, 0)

    def guess(
        self, tokens: Tensor, states: list[dict[int, int]], use_memory: bool = True
    ) -> tuple[Tensor, list[dict[int, int]]]:
        wrong = 1000 if self.keeps == "wrong" else 0
        guesses = [
            [state.get(key, -1) + wrong for key in row]
            for state, row in zip(states, tokens.tolist(), strict=True)
        ]
        return torch.tensor(guesses), states


def records(make_tools: MakeTools, keeps: str) -> tuple[list[Record], dict]:
    task = make_task("mqar_overwrite", make_tools({"mqar": OPTIONS}))
    found = []
    for setting in task.settings():
        found += task.run(setting, range(6), Reader(keeps), Meter())
    return found, task.details(found)


def test_the_last_value_is_right(make_tools: MakeTools) -> None:
    found, details = records(make_tools, "last")
    assert [record.score for record in found] == [1.0] * 12
    assert details["stale_answers"] == 0
    assert {record.tokens for record in found} == {2 * 10, 2 * 20}
    assert len({record.prompt for record in found}) == 12


def test_the_first_value_is_stale(make_tools: MakeTools) -> None:
    found, details = records(make_tools, "first")
    assert [record.score for record in found] == [0.75] * 12
    assert details["stale_answers"] == 1


def test_other_values_are_neither(make_tools: MakeTools) -> None:
    found, details = records(make_tools, "wrong")
    assert [record.score for record in found] == [0.0] * 12
    assert details["stale_answers"] == 0


def test_rows_are_regenerated(make_tools: MakeTools) -> None:
    first, second = (make_task("mqar_overwrite", make_tools({"mqar": OPTIONS})) for _ in range(2))
    plain = make_task("mqar", make_tools({"mqar": OPTIONS}))
    for index in (5, 0, 3):
        rows = [task.example(8, index).input_ids for task in (first, second)]
        assert np.array_equal(*rows)
        assert not np.array_equal(rows[0], first.example(8, index + 1).input_ids)
        assert (plain.example(8, index).stale == -100).all()


@pytest.mark.parametrize("name", ["mqar", "mqar_overwrite"])
def test_the_power_moves_the_queries(make_tools: MakeTools, name: str) -> None:
    means = []
    for power in (0.01, 1.0, 4.0):
        options = MqarOptions(length=128, pairs=[4], overwritten=1.0, power=power)
        task = make_task(name, make_tools({"mqar": options}))
        examples = [task.example(4, index) for index in range(60)]
        # From 0 at the end of the pairs to 1 at the end of the row.
        places = [
            (np.flatnonzero(example.labels != -100) - example.context_length)
            / (128 - example.context_length)
            for example in examples
        ]
        means.append(np.mean(places))
    # Means of densities proportional to gap**(power - 1): 1/2 at power 1, 4/5 at 4.
    assert means[0] < 0.35
    assert means[1] == pytest.approx(0.5, abs=0.08)
    assert means[2] == pytest.approx(0.8, abs=0.08)


def test_no_row_is_one_of_training(make_tools: MakeTools) -> None:
    options = MqarOptions(length=128, pairs=[16])
    task = make_task("mqar", make_tools({"mqar": options, "seed": 3}))
    trained = MqarRows(256, 128, 16, seed=3, random_filler=False).batch(np.arange(64))["input_ids"]
    for index in range(8):
        assert not (trained == task.example(16, index).input_ids).all(axis=1).any()


def test_a_number_of_pairs_that_is_given_twice_is_one_setting(make_tools: MakeTools) -> None:
    task = make_task("mqar", make_tools({"mqar": MqarOptions(pairs=[8, 4, 8])}))
    assert task.labels() == ["8", "4"]


def test_rows_that_are_too_short(make_tools: MakeTools) -> None:
    options = MqarOptions(length=64, pairs=[16], overwritten=1.0)
    with pytest.raises(UserError, match="16 pairs, 16 of them written twice, need 96 tokens"):
        make_task("mqar_overwrite", make_tools({"mqar": options}))
    assert make_task("mqar", make_tools({"mqar": options})).example(16, 0).context_length == 32
