"""Reading, forking and asking: neither segments nor neighbours in a batch change an answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.evaluation.conditions import Pass
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.costs import Meter, StateBytes
from memlm.evaluation.loading import make_subject
from memlm.evaluation.prompts import Context, Question, Trial
from memlm.evaluation.subject import MemorySubject, Subject, pad

MEMORIES = {
    "gated_delta": {"memory": "gated_delta"},
    "titans": {"memory": "titans"},
    "knn_cache": {"memory": {"type": "knn_cache", "segment": 8, "gate": 1.0}},
}
MODELS = [*MEMORIES, "llama"]


@pytest.fixture
def make(tiny_model, tokenizer):
    """A builder of subjects by the name of the memory, or a Llama."""

    def build(name: str, segment: int = 16) -> Subject:
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
                bos_token_id=256,
                eos_token_id=257,
            )
            model = LlamaForCausalLM(config).eval()
        else:
            model = tiny_model(**MEMORIES[name])
        return make_subject(model, tokenizer, EvaluationConfig(segment=segment))

    return build


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(32, 127, length)


def ragged_trials() -> list[Trial]:
    """Contexts of 1 to 90 tokens, one to three questions of 1 to 20 tokens, answers of 2 to 7."""
    asked = [(3,), (20, 1, 7), (5, 5)]
    return [
        Trial(
            Context([ids(length, row)]),
            tuple(
                Question(ids(size, 100 + 10 * row + number), ("x",), 2 + (row + number) % 6)
                for number, size in enumerate(sizes)
            ),
        )
        for row, (length, sizes) in enumerate(zip((50, 90, 1), asked, strict=True))
    ]


def alone(subject: Subject, trials: list[Trial], one: Pass) -> dict[str, list[list[str]]]:
    """Every question asked by itself, after a reading of its own."""
    found: dict[str, list[list[str]]] = {name: [] for name in one.conditions}
    for trial in trials:
        asked = [
            subject.ask([Trial(trial.context, (question,))], one, Meter())
            for question in trial.questions
        ]
        for name in one.conditions:
            found[name].append([answer[name][0][0] for answer in asked])
    return found


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_segments_change_nothing(make, name):
    """Any segment, also shorter than the memory's own and than a convolution."""
    trials = ragged_trials()
    one = Pass(("on",))
    expected = make(name, segment=1000).ask(trials, one, Meter())
    for segment in (5, 33):
        assert make(name, segment).ask(trials, one, Meter()) == expected
    states = [
        make(name, segment).read_contexts([Context([ids(45)])] * 2) for segment in (1000, 1, 20)
    ]
    logits = [make(name).step(torch.full((2, 4), 65), None, state, True)[0] for state in states]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_neighbours_change_nothing(make, name):
    subject, trials = make(name), ragged_trials()
    conditions = ("on", "reset") if name in MEMORIES else ("on",)
    passes = [Pass(conditions)]
    if name in MEMORIES:
        passes.append(Pass(("off",), use_memory=False))
    for one in passes:
        together = subject.ask(trials, one, Meter())
        assert together == alone(subject, trials, one)
        for answers in together.values():
            assert [len(row) for row in answers] == [1, 3, 2]
            assert len({answer for row in answers for answer in row}) > 4


@torch.inference_mode()
@pytest.mark.parametrize("name", MEMORIES)
def test_conditions_differ_and_leave_the_states(make, name):
    """What was asked before, and in which condition, changes no later answer."""
    subject = make(name)
    trials = ragged_trials()
    states = subject.read_contexts([trial.context for trial in trials])
    before = {key: state.clone().tensors() for key, state in states.items()}
    tokens = torch.full((3, 4), 65)
    logits = {
        condition: subject.step(tokens, None, subject.ablate(states, condition), True)[0]
        for condition in ("on", "reset", "swapped")
    }
    for key, state in states.items():
        for part, tensor in state.tensors().items():
            assert torch.equal(tensor, before[key][part]), (key, part)
    assert not torch.equal(logits["on"], logits["reset"])
    assert not torch.equal(logits["on"], logits["swapped"])
    whole = subject.ask(trials, Pass(("on", "reset", "swapped")), Meter())
    for condition in ("on", "reset", "swapped"):
        assert subject.ask(trials, Pass((condition,)), Meter())[condition] == whole[condition]


class Spelling(torch.nn.Module):
    """Each row's answer is written in its first token: 1 = ends at once, 2 = after two, ..."""

    END = 257

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=259)
        self.device = torch.device("cpu")
        self.max_context = None
        self.calls = 0

    def memories(self):
        return {}

    def memory_state_names(self):
        return []

    def forward(self, input_ids: Tensor, memory_states=None, **options):
        self.calls += 1
        left = input_ids[:, -1] if memory_states is None else memory_states["left"]
        logits = torch.zeros(len(left), input_ids.shape[1], 259)
        for row, count in enumerate(left.tolist()):
            logits[row, -1, ord("a") + row if count > 1 else self.END] = 1.0
        return SimpleNamespace(logits=logits[:, -1:], memory_states={"left": left - 1})


def test_the_end_of_text_ends_one_row(tokenizer):
    subject = make_subject(Spelling(), tokenizer, EvaluationConfig())
    written = subject.generate([np.array([length]) for length in (3, 1, 9)], None, 5)
    assert [bytes(row) for row in written] == [b"aa", b"", b"ccccc"]
    assert subject.model.calls == 5
    subject.model.calls = 0
    assert subject.generate([np.array([2]), np.array([3])], None, 100) == [[97], [98, 98]]
    assert subject.model.calls == 3


def test_only_written_tokens_are_counted(tokenizer, monkeypatch):
    subject = make_subject(Spelling(), tokenizer, EvaluationConfig())
    monkeypatch.setattr(subject, "state_bytes", lambda states: StateBytes(0, 0, 0))
    trials = [
        Trial(Context([np.array([count])]), (Question(np.array([0]), (), new_tokens),))
        for count, new_tokens in ((5, 9), (2, 9), (9, 2))
    ]
    meter = Meter()
    assert subject.ask(trials, Pass(("on",)), meter) == {"on": [["aaa"], [""], ["cc"]]}
    assert meter.tokens == {"read": 3, "generate": 5}


class OneSegment:
    """Token ids of a length that no memory would hold, made when they are read."""

    def __init__(self, length: int, most: int):
        self.length, self.most, self.reads = length, most, []

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert stop - start <= self.most, "more than a segment was asked for"
        self.reads.append((start, stop))
        return np.arange(start, stop) % 90 + 32


@torch.inference_mode()
def test_contexts_are_read_once_a_segment_at_a_time(oracle, tokenizer):
    pieces = [OneSegment(500, 64), OneSegment(100, 64)]
    subject = make_subject(oracle, tokenizer, EvaluationConfig(segment=64))
    seen = []
    subject.read_contexts([Context([piece]) for piece in pieces], progress=seen.append)
    assert oracle.longest_call == 64 and oracle.calls == 8
    for piece in pieces:
        reads = [(start, stop) for start, stop in piece.reads if start < stop]
        assert reads == [(start, min(start + 64, len(piece))) for start in range(0, len(piece), 64)]
    assert seen == [128, 100] + [64] * 5 + [52]


def test_the_states_of_a_memory_are_counted_by_row(make):
    subject = make("gated_delta")
    with torch.inference_mode():
        found = [
            subject.state_bytes(subject.read_contexts([Context([ids(40)])] * n)) for n in (1, 3)
        ]
    assert isinstance(subject, MemorySubject)
    assert found[0] == found[1]
    assert 0 < found[0].memory < found[0].total == found[0].memory + found[0].key_values


def test_padding_stands_where_it_is_wanted():
    rows = [np.array([1, 2, 3]), np.array([4])]
    for left, expected in ((True, [[1, 2, 3], [0, 0, 4]]), (False, [[1, 2, 3], [4, 0, 0]])):
        tokens, mask = pad(rows, left)
        assert tokens.tolist() == expected
        assert mask.tolist() == [[bool(token) for token in row] for row in expected]
    assert pad(rows[:1] * 2, left=True)[1] is None
