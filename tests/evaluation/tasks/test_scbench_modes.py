"""Conversations: what each turn goes on from, compared with reading all of it at once."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.evaluation.conditions import Pass
from memlm.evaluation.config import EvaluationConfig, ScbenchOptions
from memlm.evaluation.costs import Meter, StateBytes
from memlm.evaluation.loading import make_subject
from memlm.evaluation.prompts import ANSWER, CONTEXT, QUESTION, Context, Question, Trial
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools


def ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(32, 127, length)


def conversations(follows: str) -> list[Trial]:
    """Rows of different lengths, one with a turn less."""
    sizes = {30: (6, 3, 5), 19: (2, 9)}
    return [
        Trial(
            Context([ids(length, length)]),
            tuple(
                Question(ids(size, 10 * length + number), ("x",), 3)
                for number, size in enumerate(asked)
            ),
            follows=follows,
        )
        for length, asked in sizes.items()
    ]


def read_at_once(subject: Subject, trial: Trial) -> list[str]:
    """The answers, the whole text so far being read again for every token."""
    text = trial.context.read(0, len(trial.context)).tolist()
    answers = []
    for question in trial.questions:
        before, asked = list(text), question.token_ids.tolist()
        written: list[int] = []
        while len(written) < question.new_tokens:
            tokens = torch.tensor([before + asked + written])
            token = int(subject.model(input_ids=tokens).logits[0, -1].argmax())
            if token in subject.end_ids():
                break
            written.append(token)
        answers.append(subject.decode(written))
        text = {
            CONTEXT: before,
            QUESTION: before + asked,
            ANSWER: before + asked + written,
        }[trial.follows]
    return answers


@pytest.fixture
def make(tiny_model, tokenizer) -> Callable[[str], Subject]:
    def build(name: str) -> Subject:
        torch.manual_seed(0)
        if name == "llama":
            config = LlamaConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
                eos_token_id=257,
            )
            model = LlamaForCausalLM(config).eval()
        else:
            model = tiny_model(memory=name)
        return make_subject(model, tokenizer, EvaluationConfig(segment=16))

    return build


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gated_delta", "llama"])
def test_turns_go_on_from_where_they_should(name: str, make) -> None:
    subject = make(name)
    found = {}
    for follows in (CONTEXT, QUESTION, ANSWER):
        trials = conversations(follows)
        found[follows] = subject.ask(trials, Pass(("on",)), Meter())["on"]
        assert found[follows] == [read_at_once(subject, trial) for trial in trials]
    # Otherwise the modes would not be told apart here.
    assert found[CONTEXT] != found[QUESTION] != found[ANSWER]
    assert [row[0] for row in found[CONTEXT]] == [row[0] for row in found[ANSWER]]


@torch.inference_mode()
def test_conditions_have_conversations_of_their_own(make) -> None:
    """What is said in one condition does not reach the next."""
    subject = make("gated_delta")
    trials = conversations(ANSWER)
    conditions = ("on", "reset", "swapped")
    together = subject.ask(trials, Pass(conditions), Meter())
    for condition in conditions:
        alone = subject.ask(trials, Pass((condition,)), Meter())
        assert together[condition] == alone[condition]
    assert together["on"] != together["reset"]


class Listener(torch.nn.Module):
    """Answers with how many keys it was asked for since the start of the text, and stops.

    Attributes:
        heard: the text in front of every answer, per row in the order of asking.
    """

    END = 257

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=259)
        self.device = torch.device("cpu")
        self.max_context = None
        self.heard: list[str] = []

    def memories(self):
        return {}

    def memory_state_names(self):
        return []

    def forward(
        self, input_ids: Tensor, attention_mask=None, memory_states=None, **options
    ) -> SimpleNamespace:
        texts = ["" for _ in input_ids] if memory_states is None else memory_states["text"]
        logits = torch.zeros(len(texts), 1, 259)
        after = []
        for row, text in enumerate(texts):
            tokens = input_ids[row]
            if attention_mask is not None:
                tokens = tokens[attention_mask[row].bool()]
            text += "".join(chr(token) for token in tokens.tolist() if token < 256)
            asks = text.endswith("is: ")
            if asks:
                self.heard.append(text)
            logits[row, 0, ord(str(text.count("Key:"))) if asks else self.END] = 1.0
            after.append(text)
        return SimpleNamespace(logits=logits, memory_states={"text": after})


@pytest.mark.parametrize(
    ("mode", "history"), [("multi_request", "gold"), ("multi_turn", "gold"), ("multi_turn", "own")]
)
def test_what_a_model_hears(mode: str, history: str, tokenizer, monkeypatch) -> None:
    options = ScbenchOptions(mode=mode, history=history, turns=3)
    config = EvaluationConfig(lengths=[1500], trials=2, scbench=options)
    task = make_task("scbench_kv", Tools(config, tokenizer))
    model = Listener()
    subject = make_subject(model, tokenizer, config)
    monkeypatch.setattr(subject, "state_bytes", lambda states: StateBytes(0, 0, 0))
    (setting,) = task.settings()
    records = task.run(setting, range(2), subject, Meter())
    plain = [record for record in records if record.condition == "on"]
    expected = ["1", "1", "1"] if mode == "multi_request" else ["1", "2", "3"]
    for record in plain:
        assert [answer["prediction"] for answer in record.answers] == expected
        assert record.labels == {"mode": mode, "turn": [1, 2, 3]}
        golds = [answer["references"][0] for answer in record.answers]
        between = {
            "multi_request": None,
            "gold": f"is: {golds[0]}\n\nKey: ",
            "own": "is: 1\n\nKey: ",
        }["multi_request" if mode == "multi_request" else history]
        lasts = [text for text in model.heard if re.search(rf'"{golds[0]}"', text)]
        if between is None:
            assert all(text.count("is: ") == 1 for text in lasts)
        else:
            assert sum(between in text for text in lasts) >= 2
            assert lasts[-1].count("is: ") == 3
