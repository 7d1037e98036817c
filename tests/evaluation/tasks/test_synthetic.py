"""Synthetic tasks as evaluations: conditions, ragged examples, measures, what cannot be."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memlm.data import ByteTokenizer, load_tokenizer
from memlm.data.synthetic import Example, Generator, SyntheticRows
from memlm.data.synthetic.associative_recall import AssociativeRecall
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.config import SyntheticOptions
from memlm.evaluation.costs import Meter
from memlm.evaluation.subject import MemorySubject
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.layers.state import MemoryState

MakeTools = Callable[..., Tools]
VOCABULARY = 259


@dataclasses.dataclass
class Seen(MemoryState):
    """followers [B, V]: what followed each token last; last [B]; total [B]: the sum of tokens."""

    followers: Tensor
    last: Tensor
    total: Tensor

    def reset(self, rows: Tensor | None = None) -> "Seen":
        return Seen(*(torch.zeros_like(value) for value in self.tensors().values()))


class Follower(nn.Module):
    """Answers with what followed the token before, or with 0."""

    config = SimpleNamespace(vocab_size=VOCABULARY)
    device = torch.device("cpu")
    max_context = None

    def memories(self):
        return {"memory": SimpleNamespace(name="follower")}

    def memory_state_names(self):
        return ["memory"]

    def answer(self, state: Seen, token: Tensor) -> Tensor:
        return state.followers.gather(1, token[:, None])[:, 0]

    def forward(self, input_ids, attention_mask=None, memory_states=None, use_memory=True, **_):
        assert attention_mask is None
        rows, length = input_ids.shape
        none = torch.zeros(rows, dtype=torch.int64)
        state = (memory_states or {}).get("memory")
        state = state or Seen(torch.zeros(rows, VOCABULARY, dtype=torch.int64), none, none)
        logits = torch.zeros(rows, length, VOCABULARY)
        for column in range(length):
            token = input_ids[:, column]
            followers = state.followers.scatter(1, state.last[:, None], token[:, None])
            state = Seen(followers, token, state.total + token)
            said = self.answer(state, token) if use_memory else none
            logits[torch.arange(rows), column, said] = 1.0
        return SimpleNamespace(logits=logits, memory_states={"memory": state})


class Counter(Follower):
    """Answers with the parity of the sum of all tokens."""

    def answer(self, state: Seen, token: Tensor) -> Tensor:
        return state.total % 2


class Agreeable(Follower):
    """Always says yes."""

    def answer(self, state: Seen, token: Tensor) -> Tensor:
        return torch.ones_like(token)


def judge(model: nn.Module, name: str, lengths: list[int | str], **options) -> dict:
    synthetic = SyntheticOptions(lengths=lengths, rows=10, options={name: options})
    config = EvaluationConfig(tasks=[name], synthetic=synthetic, batch_size=4, segment=5)
    return evaluate(model, ByteTokenizer(), config, progress=False)["runs"][0]["tasks"][name]


def test_facts_are_kept_by_the_memory_alone() -> None:
    task = judge(Follower(), "associative_recall", ["16..32"])
    assert list(task["scores"]) == ["16", "32"]
    for length in ("16", "32"):
        scores = task["scores"][length]
        assert scores.keys() == {"on", "off", "reset", "swapped"}
        assert scores["on"]["value"] == 1.0
        assert scores["on"]["count"] == scores["swapped"]["count"] == 10
        assert scores["off"]["value"] == scores["reset"]["value"] == 0.0
        assert scores["swapped"]["value"] == 0.0
        assert task["memory_gain"][length]["reset"]["value"] == 1.0
        assert task["by_memory"][length]["value"] == 1.0
    # Of 16 tokens six pairs and a question of three are 15, read once for on and once for off.
    cost = task["cost"]["16"]
    assert cost["tokens"] == {"read": 2 * 10 * 12, "answer": 4 * 10 * 3}
    assert cost["state_bytes"] == cost["memory_state_bytes"] == 8 * (VOCABULARY + 2)
    assert "measures" not in task
    assert task["vocabulary"] == 257
    assert task["title"] == "Associative recall"


def test_without_a_context_of_its_own_nothing_is_reset_or_swapped() -> None:
    task = judge(Counter(), "parity", [7, 20])
    for length in ("7", "20"):
        scores = task["scores"][length]
        assert scores.keys() == {"on", "off"}
        assert scores["on"]["value"] == 1.0
        # Off it always says 0.
        assert 0.2 < scores["off"]["value"] < 0.8
    assert task["cost"]["20"]["tokens"] == {"answer": 2 * 10 * 20}
    assert task["cost"]["20"]["state_bytes"] == 8 * (VOCABULARY + 2)


def test_the_score_is_a_mean_over_examples_of_the_share_of_right_answers(
    make_tools: MakeTools,
) -> None:
    task = make_task("parity", make_tools({"synthetic": SyntheticOptions(lengths=[9], rows=8)}))
    records = run(task, Agreeable())
    scores = {r.trial: r.score for r in records if r.condition == "on"}
    for index, score in scores.items():
        example = task.generator.example(9, task.rng(9, index))
        odd = sum(int(example.input_ids[: place + 1].sum()) % 2 for place in range(9))
        assert score == pytest.approx(odd / 9)
    assert len(set(scores.values())) > 1


def test_measures_by_setting_and_condition() -> None:
    task = judge(Agreeable(), "n_back", [12, 40], n=3)
    assert task["measures"].keys() == {"12", "40"}
    for measures in task["measures"].values():
        assert measures.keys() == {"on", "off"}
        assert measures["on"]["hit_rate"] == measures["on"]["false_alarm_rate"] == 1.0
        assert measures["off"]["hit_rate"] == measures["off"]["false_alarm_rate"] == 0.0
    # Counts of all ten examples together: 90 positions at 12 tokens, T of them targets, have
    # d' = z((T + 0.5) / (T + 1)) - z((90 - T + 0.5) / (90 - T + 1)), far from the mean of tens.
    targets = round(task["scores"]["12"]["on"]["value"] * 90)
    normal = torch.distributions.Normal(0.0, 1.0)
    rates = torch.tensor([(k + 0.5) / (k + 1) for k in (targets, 90 - targets)])
    expected = normal.icdf(rates)
    found = task["measures"]["12"]["on"]["d_prime"]
    assert found == pytest.approx(float(expected[0] - expected[1]), abs=1e-4)
    assert task["vocabulary"] == 10


@dataclasses.dataclass(frozen=True)
class Ragged(Generator):
    """A token's follower is asked, behind contexts of 2, 4 or 6 tokens; `filled`: zeros follow."""

    title = "Ragged"
    description = "Followers."

    filled: bool = False

    @property
    def vocabulary(self) -> int:
        return 60

    def check(self, length: int) -> None:
        pass

    def example(self, length: int, rng: np.random.Generator) -> Example:
        pairs = int(rng.integers(1, 4))
        tokens = 1 + rng.permutation(59)[: 2 * pairs]
        filler = length - 2 * pairs - 1 if self.filled else 0
        labels = np.array([-100] * 2 * pairs + [tokens[1]] + [-100] * filler)
        return Example(np.array([*tokens, tokens[0], *[0] * filler]), labels, 2 * pairs)


def run(task, model: nn.Module) -> list:
    subject = MemorySubject(model, None, make_plan(model), 3)
    (setting,) = task.settings()
    return task.run(setting, range(setting.trials), subject, Meter())


@pytest.mark.parametrize("filled", [False, True])
def test_ragged_examples(make_tools: MakeTools, filled: bool) -> None:
    task = make_task("parity", make_tools({"synthetic": SyntheticOptions(lengths=[8], rows=7)}))
    task.generator = Ragged(filled)
    examples = [task.generator.example(8, task.rng(8, index)) for index in range(7)]
    cuts = [example.context_length for example in examples]
    assert sorted(cuts) == [2, 4, 4, 4, 6, 6, 6]
    records = run(task, Follower())
    found = {(record.condition, record.trial): record for record in records}
    assert len(found) == len(records)
    for index, cut in enumerate(cuts):
        assert found["on", index].score == 1.0
        assert found["on", index].tokens == (8 if filled else cut + 1)
        assert found["off", index].score == found["reset", index].score == 0.0
        # A row alone of its shape has nobody to swap with.
        assert (("swapped", index) in found) == (cuts.count(cut) > 1)
        assert found.get(("swapped", index), found["off", index]).score == 0.0


class RaggedLosses(Ragged):
    """Counts the losses of answers, and those of all positions."""

    def loss_counts(self, example: Example, losses: np.ndarray) -> dict[str, float]:
        asked = example.labels != -100
        return {"asked": float(losses[asked].sum()), "all": float(losses.sum())}


def test_losses_stand_where_the_answers_do(make_tools: MakeTools) -> None:
    task = make_task("parity", make_tools({"synthetic": SyntheticOptions(lengths=[8], rows=7)}))
    task.generator = RaggedLosses(filled=True)
    # The model gives its answer a logit of one and the other tokens none.
    total = math.log(math.e + VOCABULARY - 1)
    for record in run(task, Follower()):
        loss = total - (record.condition == "on")
        assert record.labels["counts"] == pytest.approx({"asked": loss, "all": loss})


def test_examples_do_not_depend_on_what_else_is_asked(make_tools: MakeTools) -> None:
    def prompts(**options) -> dict:
        synthetic = SyntheticOptions(**({"lengths": [24], "rows": 6} | options))
        task = make_task("induction", make_tools({"synthetic": synthetic}))
        records = []
        for setting in task.settings():
            for start in range(0, setting.trials, 2):
                subject = MemorySubject(Follower(), None, make_plan(Follower()), 64)
                records += task.run(setting, range(start, start + 2), subject, Meter())
        return {(r.setting, r.trial): r.prompt for r in records}

    few, many = prompts(), prompts(lengths=[16, 24], rows=8)
    assert len(set(many.values())) == 16
    assert few == {place: many[place] for place in few}


def test_no_example_is_one_of_training(make_tools: MakeTools) -> None:
    options = SyntheticOptions(lengths=[31], rows=50)
    task = make_task("associative_recall", make_tools({"synthetic": options, "seed": 3}))
    rows = SyntheticRows(AssociativeRecall(), 31, seed=3).batch(np.arange(200))["input_ids"]
    trained = {row.tobytes() for row in rows}
    asked = {
        task.generator.example(31, task.rng(31, index)).input_ids.tobytes() for index in range(50)
    }
    assert len(asked) == 50
    assert not asked & trained


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("induction", {"lengths": [2]}, "2 occurrences need at least 3 tokens, got 2"),
        ("group_word_problem", {"options": {"group_word_problem": {"group": "q"}}}, "group 'q'"),
        ("associative_recall", {"lengths": [8, 400]}, "198 pairs in 400 tokens need as many keys"),
        (
            "associative_recall",
            {"options": {"associative_recall": {"keys": 300}}},
            "associative_recall: needs 429 token ids, the tokenizer of the model has 259",
        ),
    ],
)
def test_tasks_that_cannot_be(
    make_tools: MakeTools, name: str, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_task(name, make_tools({"synthetic": SyntheticOptions(**options)}))


def test_a_tokenizer_of_as_many_numbers_is_enough(make_tools: MakeTools) -> None:
    options = {"synthetic": SyntheticOptions(options={"associative_recall": {"keys": 300}})}
    make_task("associative_recall", make_tools(options, load_tokenizer("integers:429")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "synthetic.lengths"),
        ({"lengths": ["x"]}, "synthetic.lengths"),
        ({"rows": 1}, "synthetic.rows: 1 is too small; the least is 2"),
        ({"options": {"paritty": {}}}, r"unknown task 'paritty'; did you mean 'parity'\?"),
        ({"options": {"induction": {"token": 4}}}, "synthetic.options.induction.*'token'; did you"),
        ({"options": {"induction": {"tokens": "4"}}}, "induction.tokens: needs int, got '4'"),
        ({"options": {"parity": {"n": 4}}}, r"parity \(parity\): unknown key 'n' \(valid: none\)"),
        ({"options": {"parity": None}}, "synthetic.options.parity: needs a mapping of options"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticOptions(**options).validate()
