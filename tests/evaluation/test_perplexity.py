import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memlm.data.corpus import Corpus
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import PerplexityOptions
from memlm.evaluation.tasks.perplexity import buckets, choose_documents

LENGTHS = (150, 150, 90)


@pytest.fixture
def files(tmp_path):
    paths = []
    for index, length in enumerate(LENGTHS):
        generator = np.random.default_rng(index)
        path = tmp_path / f"document{index}.txt"
        path.write_bytes(generator.integers(97, 123, length, dtype=np.uint8).tobytes())
        paths.append(str(path))
    return paths


def _evaluate(model, tokenizer, files, **options):
    defaults = {"length": 140, "documents": 3, "segment": 50}
    perplexity = PerplexityOptions(**(defaults | options), files=files)
    config = EvaluationConfig(tasks=["perplexity"], perplexity=perplexity)
    return evaluate(model, tokenizer, config, progress=False)["runs"][0]["tasks"]["perplexity"]


def _documents(files):
    return [torch.tensor([list(open(path, "rb").read()[:140])]) for path in files]


def _bits(model, document, **arguments):
    with torch.no_grad():
        logits = model(document[:, :-1], **arguments).logits
    return F.cross_entropy(logits[0], document[0, 1:], reduction="none") / math.log(2)


def test_on_and_off_equal_one_plain_pass(gated_delta, tokenizer, files):
    task = _evaluate(gated_delta, tokenizer, files)
    for condition, arguments in (("on", {}), ("off", {"use_memory": False})):
        losses = [_bits(gated_delta, document, **arguments) for document in _documents(files)]
        expected = np.mean([float(loss.mean()) for loss in losses])
        assert task["scores"]["all"][condition]["value"] == pytest.approx(expected, abs=1e-4)
        early = np.mean([float(loss[:127].mean()) for loss in losses])
        assert task["scores"]["1-127"][condition]["value"] == pytest.approx(early, abs=1e-4)
        nats = math.log(2) * float(torch.cat(losses).mean())
        assert task["perplexity_per_token"][condition] == pytest.approx(math.exp(nats), rel=1e-4)
    assert task["scores"]["128-139"]["on"]["count"] == 2  # the short document does not get there


def test_reset_empties_the_memory_at_every_segment(gated_delta, tokenizer, files):
    task = _evaluate(gated_delta, tokenizer, files)
    means = []
    for document in _documents(files):
        losses, states = [], None
        for start in range(0, document.shape[1] - 1, 50):
            part = document[:, start : start + 51]
            if states is not None:
                fresh = {name: states[name].reset() for name in gated_delta.memory_state_names()}
            with torch.no_grad():
                read = {"memory_states": None if states is None else states | fresh}
                losses.append(_bits(gated_delta, part, **read))
                states = gated_delta(
                    part[:, :-1], memory_states=states, return_memory_states=True
                ).memory_states
        means.append(float(torch.cat(losses).mean()))
    assert task["scores"]["all"]["reset"]["value"] == pytest.approx(np.mean(means), abs=1e-4)
    assert task["scores"]["all"]["on"]["value"] != pytest.approx(np.mean(means), abs=1e-4)


def test_the_memory_of_an_equal_document_costs_nothing(gated_delta, tokenizer, files):
    same = _evaluate(gated_delta, tokenizer, [files[0], *_copies(files[0], 2)])
    assert same["memory_gain"]["all"]["swapped"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["memory_gain"]["all"]["reset"]["value"] != pytest.approx(0, abs=1e-4)
    other = _evaluate(gated_delta, tokenizer, files)
    assert other["memory_gain"]["all"]["swapped"]["value"] != pytest.approx(0, abs=1e-4)


def _copies(path, count):
    names = [f"{path}.copy{index}" for index in range(count)]
    for name in names:
        with open(path, "rb") as source, open(name, "wb") as copy:
            copy.write(source.read())
    return names


def test_gain_is_positive_where_the_memory_helps(gated_delta, tokenizer, files):
    task = _evaluate(gated_delta, tokenizer, files)
    gain = task["memory_gain"]["all"]["off"]["value"]
    scores = task["scores"]["all"]
    assert gain == pytest.approx(scores["off"]["value"] - scores["on"]["value"], abs=1e-6)


def test_first_segment_is_shared(gated_delta, tokenizer, files):
    task = _evaluate(gated_delta, tokenizer, files, segment=200)
    assert task["memory_gain"]["all"]["reset"] == {"value": 0, "low": 0, "high": 0, "count": 3}


def test_bits_per_byte_count_bytes(tiny_model, files, monkeypatch):
    class Halves:
        """One token for two bytes, but for the bos."""

        vocab_size = 259
        bos_token_id = 0

        def __len__(self):
            return 259

        def get_vocab(self):
            return {}

        def decode(self, ids):
            return "".join("<bos>" if token == 0 else "ab" for token in ids)

    model = tiny_model(memory="gated_delta")
    documents = [torch.arange(100).numpy(), torch.arange(50, 150).numpy()]
    corpus = Corpus(np.concatenate(documents), np.array([0, 100, 200]))
    monkeypatch.setattr(
        "memlm.evaluation.tasks.perplexity.held_out_corpus", lambda tokenizer, files: corpus
    )
    task = _evaluate(model, Halves(), [], documents=2, length=100)
    tokens = [float(_bits(model, torch.from_numpy(d)[None]).mean()) for d in documents]
    assert task["scores"]["all"]["on"]["value"] == pytest.approx(np.mean(tokens) / 2, abs=1e-4)


def test_documents_are_the_first_long_ones_then_the_longest():
    lengths = [5, 30, 1, 12, 40, 30]
    tokens = np.arange(sum(lengths))
    corpus = Corpus(tokens, np.concatenate([[0], np.cumsum(lengths)]))
    chosen = choose_documents(corpus, 5, 30)
    assert [len(document) for document in chosen] == [30, 30, 30, 12, 5]
    assert [int(document[0]) for document in chosen] == [5, 48, 88, 36, 0]
    assert len(choose_documents(corpus, 2, 30)) == 2
    with pytest.raises(UserError, match="1 document with text"):
        choose_documents(Corpus(tokens[:9], np.array([0, 9])), 5, 30)


@pytest.mark.parametrize("weight", [math.nan, 1e4])
def test_losses_without_bounds_are_reported(gated_delta, tokenizer, files, tmp_path, weight):
    """No number at all, or one whose perplexity is too large to be one."""
    gated_delta.model.norm.weight.data.fill_(weight)
    options = PerplexityOptions(length=140, documents=3, segment=50, files=files)
    config = EvaluationConfig(tasks=["perplexity"], perplexity=options)
    found = evaluate(gated_delta, tokenizer, config, tmp_path, progress=False)
    task = found["runs"][0]["tasks"]["perplexity"]
    assert task["perplexity_per_token"]["on"] is None
    assert (task["scores"]["all"]["on"]["value"] is None) == math.isnan(weight)
    assert "perplexity per token: on ?" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("length", [16, 128, 129, 700, 4096])
def test_buckets_cover_every_predicted_position(length):
    covered = [position for low, high in buckets(length) for position in range(low, high)]
    assert covered == list(range(1, length))
