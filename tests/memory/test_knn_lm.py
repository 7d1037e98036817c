"""kNN-LM: the laws on a model with its store, a slow version, by hand, and what is refused."""

import copy
import math
import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm import UserError
from memlm.layers.context import CallContext
from memlm.memory.knn_lm import KnnLM, KnnLMConfig
from memlm.memory.output_memory import WEIGHTS
from memlm.retrieval.corpus_store import CorpusStore
from memlm.retrieval.vector_store import ValueSpec
from tests.memory.contract import LAWS
from tests.memory.law_tools import VOCABULARY, Case, Spec, build_model, run
from tests.memory.test_laws import check

SIZE = 6
NEXT_TOKEN = {"next_token": ValueSpec((), torch.int32)}
LAYERS = [{"mixer": {"type": "sliding_attention", "window": 5, "num_heads": 2}, "ffn": "swiglu"}]
# A store belongs to one set of weights, so not to the model loaded as bfloat16 (save/load); there
# is no state, and the distribution takes no gradient.
NOT_HERE = ("gradient", "save/load")


def write_store(folder, keys, tokens, projection="p", metric="l2", values=NEXT_TOKEN):
    options = {"metric": metric, "projection": projection, "values": values}
    with CorpusStore.create(folder, key_size=keys.shape[1], key_type="float32", **options) as store:
        store.add(keys, {name: tokens.to(spec.dtype) for name, spec in values.items()})
        store.commit()
    return str(folder)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_ids(*shape, seed=0, tokens=VOCABULARY):
    return torch.randint(1, tokens, shape, generator=torch.Generator().manual_seed(seed))


def add_store(model, folder, **options):
    """Put kNN-LM behind the head of a model, with what it makes of some random text."""
    ids = draw_ids(8, 33, seed=5)
    with torch.no_grad():
        hidden = model.model(ids)[0][:, :-1].flatten(0, 1).float()
    write_store(folder, hidden, ids[:, 1:].flatten(), model.weights_fingerprint())
    model.set_output_memory({"type": "knn_lm", "store": str(folder), **options})
    return model


class StoreCase(Case):
    """A case whose every model has a store of its own."""

    def build(self, dtype=torch.float64, with_memory=True, repeat=2, **options):
        base = super().build(dtype, with_memory=False, repeat=repeat)
        if not with_memory:
            return base
        folder = tempfile.mkdtemp(dir=FOLDER.name)
        return add_store(base, folder, **{**self.spec.options, **options})


FOLDER = tempfile.TemporaryDirectory()  # removed when the tests have ended
CASE = StoreCase(
    "knn_lm", "output", Spec(("output",), {"top_k": 5, "weight": 0.4, "temperature": 5.0}, "corpus")
)


@pytest.mark.parametrize("case", [CASE], ids=str)
@pytest.mark.parametrize("law", [law for law in LAWS if law not in NOT_HERE])
def test_law(law, case, law_counter):
    check(law, case, law_counter, case.examples)


def build(folder, hidden_size=SIZE, **options):
    return KnnLM(KnnLMConfig(store=str(folder), **options), hidden_size)


def context(batch_size, length, projection="p"):
    return CallContext.plain(batch_size, length, shared={WEIGHTS: lambda: projection})


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("top_k", [1, 7, 1000])
def test_against_the_slow_version(tmp_path, metric, top_k):
    keys, tokens = draw(300, SIZE, dtype=torch.float32), draw_ids(300, tokens=9)
    write_store(tmp_path / "s", keys, tokens, metric=metric)
    options = {"metric": metric, "top_k": top_k, "temperature": 0.8, "weight": 0.3}
    memory = build(tmp_path / "s", **options)
    hidden, logits = draw(2, 5, SIZE, seed=1), draw(2, 5, 9, seed=2)
    mixed, state = memory(hidden, logits, None, context(2, 5))
    assert state is None
    for row in range(2):
        for t in range(5):
            q = hidden[row, t]
            scores = []
            for key in keys.double():
                scores.append(
                    {
                        "l2": -float((q - key).square().sum()),
                        "dot": float(q @ key),
                        "cosine": float(q @ key / (q.norm() * key.norm())),
                    }[metric]
                )
            nearest = sorted(range(300), key=lambda i: -scores[i])[:top_k]
            weights = [math.exp(scores[i] / 0.8) for i in nearest]
            p = 0.7 * logits[row, t].softmax(-1)
            for i, weight in zip(nearest, weights, strict=True):
                p[tokens[i]] += 0.3 * weight / sum(weights)
            torch.testing.assert_close(mixed[row, t], p.log(), rtol=0, atol=1e-10)


def test_by_hand(tmp_path):
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
    write_store(tmp_path / "s", keys, torch.tensor([3, 1, 2]))
    memory = build(tmp_path / "s", 2, top_k=2, weight=0.5, temperature=1 / math.log(3))
    hidden = torch.tensor([[[0.0, 0.0], [0.5, 0.0]]])
    mixed, _ = memory(hidden, torch.zeros(1, 2, 4), None, context(1, 2))
    # Distances 0 and 1, so shares 3/4 and 1/4; then twice the same distance.
    expected = torch.tensor([[1 / 8, 1 / 4, 1 / 8, 1 / 2], [1 / 8, 3 / 8, 1 / 8, 3 / 8]])
    torch.testing.assert_close(mixed[0].exp(), expected)


def test_an_empty_store_and_padding_leave_the_logits(tmp_path):
    write_store(tmp_path / "s", torch.zeros(0, SIZE), torch.zeros(0))
    hidden, logits = draw(2, 5, SIZE), draw(2, 5, 9)
    assert torch.equal(build(tmp_path / "s")(hidden, logits, None, context(2, 5))[0], logits)

    model = add_store(build_model(LAYERS), tmp_path / "m")
    ids, mask = draw_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    with_memory = run(model, ids, attention_mask=mask)[0]
    base = run(model, ids, attention_mask=mask, use_memory=False)[0]
    same = (with_memory == base).all(-1)
    assert torch.equal(same, mask == 0)


REFUSED = [
    ({"projection": "q"}, {}, "knn_lm: .*its keys were made by other weights"),
    ({}, {"metric": "cosine"}, "knn_lm: .*made for the metric 'l2', not for 'cosine'"),
    ({"values": {"token": NEXT_TOKEN["next_token"]}}, {}, "which token follows an entry"),
    ({}, {"hidden_size": 5}, "keys of 6 numbers.*hidden states of 5"),
]


@pytest.mark.parametrize(("written", "wanted", "message"), REFUSED)
def test_refused_stores(tmp_path, written, wanted, message):
    write_store(tmp_path / "s", draw(4, SIZE, dtype=torch.float32), torch.arange(4), **written)
    memory = build(tmp_path / "s", **wanted)
    with pytest.raises(UserError, match=message) as error:
        memory(draw(1, 2, memory.hidden_size), draw(1, 2, 9), None, context(1, 2))
    assert "\n" not in str(error.value)


def test_no_store_there(tmp_path):
    memory = build(tmp_path / "nothing")
    with pytest.raises(UserError, match="knn_lm: .*nothing"):
        memory(draw(1, 2, SIZE), draw(1, 2, 9), None, context(1, 2))
    # Nor is it looked for where it has no say.
    logits = draw(1, 2, 9)
    assert (
        build(tmp_path / "nothing", weight=0.0)(draw(1, 2, SIZE), logits, None, None)[0] is logits
    )


def test_saved_as_a_path_and_bound_to_the_weights(tmp_path):
    model = add_store(build_model(LAYERS, torch.float32), tmp_path / "s", top_k=4)
    ids = draw_ids(2, 9)
    expected = run(model, ids)[0]
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.output["store"] == str(tmp_path / "s")
    assert torch.equal(run(copy.deepcopy(loaded), ids)[0], expected)
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1e-3
    with pytest.raises(UserError, match="its keys were made by other weights"):
        run(loaded, ids)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="its keys were made by other weights"):
        run(half, ids)


def test_opened_once_and_shared_with_no_copy(tmp_path, monkeypatch):
    opened = []
    original = CorpusStore.open.__func__

    def counted(cls, *args, **kwargs):
        opened.append(kwargs)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(CorpusStore, "open", classmethod(counted))
    model = add_store(build_model(LAYERS), tmp_path / "s", top_k=4)
    assert not opened
    for _ in range(3):
        run(model, draw_ids(1, 4))
    assert len(opened) == 1
    assert opened[0].get("read_only", True)
    run(copy.deepcopy(model), draw_ids(1, 4))  # opens it itself: mapped, so nothing is copied
    assert len(opened) == 2


def test_an_index_of_the_store_is_used_and_named(tmp_path, caplog):
    folder = tmp_path / "s"
    write_store(folder, draw(400, SIZE, dtype=torch.float32), draw_ids(400, tokens=9))
    hidden, logits = draw(2, 5, SIZE, seed=1), draw(2, 5, 9, seed=2)

    def mixed(engine):
        return build(folder, top_k=7, engine=engine)(hidden, logits, None, context(2, 5))[0]

    with caplog.at_level("INFO", logger="memlm.memory.knn_lm"):
        expected = mixed("auto")
        assert "400 entries, searched exactly" in caplog.text
        with pytest.raises(UserError, match="knn_lm: .*has no index, not one of 'faiss_flat'"):
            mixed("faiss_flat")
        with CorpusStore.open(folder, read_only=False) as store:
            store.build_index("faiss_flat")
        torch.testing.assert_close(mixed("auto"), expected, rtol=0, atol=1e-5)
        assert "searched by faiss_flat (recall 1.0000 when it was built)" in caplog.text
    assert torch.equal(mixed("exact"), expected)


def test_generation_finds_the_corpus(tmp_path):
    """With a store of one text and nearly all the weight, the text is said again."""
    model = build_model(LAYERS)
    text = draw_ids(1, 30, seed=8)
    with torch.no_grad():
        hidden = model.model(text)[0][0, :-1].float()
    write_store(tmp_path / "s", hidden, text[0, 1:], model.weights_fingerprint())
    options = {"top_k": 1, "weight": 0.999}
    model.set_output_memory({"type": "knn_lm", "store": str(tmp_path / "s"), **options})
    said = model.generate(text[:, :6], max_new_tokens=24, do_sample=False)
    assert torch.equal(said, text)
