import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.cuda import native as loader
from memlm.cuda import quantize_keys, topk_search
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.topk_search import eager, native, reference
from memlm.errors import UserError

NATIVE = pytest.param("native", marks=pytest.mark.native(native.SOURCE))
IMPLEMENTATIONS = ("reference", "eager", NATIVE)
METRICS = ("dot", "l2", "cosine")


def score(query, key, metric):
    """Straight from the definition of a metric."""
    dot = float((query * key).sum())
    if metric == "dot":
        return dot
    if metric == "l2":
        return 2 * dot - float((key * key).sum())
    return dot / (float(query.norm()) * float(key.norm()))


def brute_force(queries, keys, k, metric, visible):
    """(scores, indices) from python sorting; `visible` is a function of (row, token, key)."""
    scores = torch.full((*queries.shape[:2], k), -torch.inf, dtype=queries.dtype)
    indices = torch.full((*queries.shape[:2], k), -1)
    for b in range(queries.shape[0]):
        for t in range(queries.shape[1]):
            found = sorted(
                (-score(queries[b, t], keys[b, m], metric), m)
                for m in range(keys.shape[1])
                if visible(b, t, m)
            )[:k]
            for rank, (negative, m) in enumerate(found):
                scores[b, t, rank], indices[b, t, rank] = -negative, m
    return scores, indices


@pytest.fixture(params=[(256, 4096), (3, 4)], ids=["one block", "small blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(eager, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(eager, "KEY_BLOCK", request.param[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_finds_the_nearest(monkeypatch, blocks, implementation, metric, k):
    monkeypatch.setenv(VARIABLE, implementation)
    dtype = torch.float32 if implementation == "native" else torch.float64
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 7, 3, generator=generator, dtype=dtype)
    keys = torch.randn(2, 13, 3, generator=generator, dtype=dtype)
    valid = torch.rand(2, 13, generator=generator) < 0.7
    key_positions = torch.randint(-1, 12, (2, 13), generator=generator)
    first = torch.randint(0, 6, (2, 7), generator=generator)
    last = first + torch.randint(0, 9, (2, 7), generator=generator)
    arguments = {
        "nothing": ({}, lambda b, t, m: True),
        "valid": ({"valid": valid}, lambda b, t, m: valid[b, m]),
        "positions": (
            {"positions": (key_positions, first, last)},
            lambda b, t, m: first[b, t] <= key_positions[b, m] < last[b, t],
        ),
        "both": (
            {"valid": valid, "positions": (key_positions, first, last)},
            lambda b, t, m: valid[b, m] and first[b, t] <= key_positions[b, m] < last[b, t],
        ),
    }
    for name, (kwargs, visible) in arguments.items():
        scores, indices = topk_search(queries, keys, k, metric, **kwargs)
        expected_scores, expected = brute_force(queries, keys, k, metric, visible)
        assert scores.dtype == dtype
        assert torch.equal(indices, expected), name
        torch.testing.assert_close(scores, expected_scores)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 40),
    stored=st.integers(0, 23),
    k=st.integers(1, 12),
    query_block=st.integers(1, 10),
    key_block=st.integers(1, 12),
)
def test_ties_have_one_order_however_the_search_is_cut(
    seed, tokens, stored, k, query_block, key_block
):
    generator = torch.Generator().manual_seed(seed)
    # Few integer values: equal scores everywhere, and exact in floating point.
    queries = torch.randint(-1, 2, (2, tokens, 2), generator=generator).float()
    keys = torch.randint(-1, 2, (2, stored, 2), generator=generator).float()
    last = torch.arange(tokens).expand(2, -1) * 3
    positions = (torch.arange(stored).expand(2, -1), (last - 10).clamp(min=0), last)

    def visible(b, t, m):
        return max(3 * t - 10, 0) <= m < 3 * t

    expected = brute_force(queries, keys, k, "dot", visible)
    searches = [reference.topk_search, eager.topk_search]
    if loader.unavailable(native.SOURCE) is None:
        searches.append(native.topk_search)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "QUERY_BLOCK", query_block)
        patch.setattr(eager, "KEY_BLOCK", key_block)
        for search in searches:
            scores, indices = search(queries, keys, k, "dot", None, positions, None)
            assert torch.equal(indices, expected[1])
            assert torch.equal(scores, expected[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_scored_in_float32_without_gradient(monkeypatch, implementation, dtype):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(1, 40, 16, generator=generator).to(dtype).requires_grad_()
    keys = torch.randn(1, 200, 16, generator=generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores, indices = topk_search(queries, keys, 3)
    expected = (queries.double() @ keys.double().transpose(1, 2)).topk(3)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(scores, expected.values.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_keys_of_one_byte_are_scaled(monkeypatch, implementation, metric):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(2, 30, 24, generator=generator)
    exact = torch.randn(2, 150, 24, generator=generator) * torch.rand(
        2, 150, 1, generator=generator
    )
    keys, scales = quantize_keys(exact)
    scores, indices = topk_search(queries, keys, 4, metric, scales=scales)
    restored = keys.double() * scales.double()[..., None]
    assert (restored - exact).abs().amax(-1).le(0.51 * scales).all()
    expected = reference.topk_search(queries.double(), restored, 4, metric, None, None, None)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "eager"])
def test_float64_keys_are_scored_in_float64(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    keys = torch.tensor([[[1.0], [1 + 1e-12]]], dtype=torch.float64)
    for queries in (torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.float64)):
        scores, indices = topk_search(queries, keys, 2)
        assert scores.dtype == torch.float64 and indices.tolist() == [[[1, 0]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_what_is_no_score_is_not_found(monkeypatch, implementation, tokens):
    monkeypatch.setenv(VARIABLE, implementation)
    keys = torch.tensor([torch.nan, 3.0, -torch.inf, torch.inf, -0.0, 0.0, torch.nan, -1.0])
    queries = torch.ones(1, tokens, 1)
    for metric in ("dot", "l2"):
        scores, indices = topk_search(queries, keys[None, :, None], 8, metric)
        for token in range(tokens):
            # Of l2, infinity - infinity is no number and -infinity no score.
            dot = ([3, 1, 4, 5, 7, -1, -1, -1], [torch.inf, 3.0, 0.0, 0.0, -1.0])
            l2 = ([4, 5, 1, 7, -1, -1, -1, -1], [0.0, 0.0, -3.0, -3.0])
            expected, values = dot if metric == "dot" else l2
            assert indices[0, token].tolist() == expected
            assert scores[0, token].tolist() == values + [-torch.inf] * (8 - len(values))
    queries[0, 0] = torch.nan
    assert (topk_search(queries, keys[None, :, None], 2)[1][0, 0] == -1).all()
    bad, scales = quantize_keys(torch.tensor([[[torch.inf, 1.0], [torch.nan, 1.0], [0.0, 0.0]]]))
    assert topk_search(torch.ones(1, tokens, 2), bad, 3, scales=scales)[1][0, 0].tolist() == [
        *(2, -1, -1)
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_search_or_to_find(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    for batch, tokens, stored, width in ((2, 3, 0, 4), (2, 0, 5, 4), (0, 3, 5, 4), (2, 3, 5, 0)):
        queries, keys = torch.zeros(batch, tokens, width), torch.zeros(batch, stored, width)
        scores, indices = topk_search(queries, keys, 2)
        assert scores.shape == indices.shape == (batch, tokens, 2)
        if stored:
            assert (scores == 0).all() and (indices == torch.arange(2)).all()
        else:
            assert (scores == -torch.inf).all() and (indices == -1).all()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    scores, indices = topk_search(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), 2, valid=nothing)
    assert (scores == -torch.inf).all() and (indices == -1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_search_only_their_own_store(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(3, 4, 8, generator=generator)
    keys = torch.randn(3, 10, 8, generator=generator)
    together = topk_search(queries, keys, 4)
    for row in range(3):
        alone = topk_search(queries[row : row + 1], keys[row : row + 1], 4)
        assert torch.equal(together[1][row : row + 1], alone[1])
    changed = keys.clone()
    changed[1] = torch.nan
    for row in (0, 2):
        assert torch.equal(topk_search(queries, changed, 4)[0][row], together[0][row])


def test_bad_arguments():
    queries = torch.zeros(1, 2, 3)
    byte, scales = queries.to(torch.int8), torch.zeros(1, 2)
    places = torch.zeros(1, 2, dtype=torch.int64)
    for message, arguments in (
        ("'cosin' is not one of.*did you mean 'cosine'", (queries, queries, 1, "cosin")),
        ("k = 0 must be at least 1", (queries, queries, 0)),
        (r"keys \[1, 2, 4\] do not fit", (queries, torch.zeros(1, 2, 4), 1)),
        (r"keys \[2, 2, 3\] do not fit", (queries, torch.zeros(2, 2, 3), 1)),
        (r"keys \[2, 3\] do not fit", (queries, queries[0], 1)),
        ("queries are torch.int64", (queries.long(), queries, 1)),
        (
            "keys are torch.int32; they must be float32, float16.* or int8",
            (queries, queries.int(), 1),
        ),
        ("int8 keys need scales; memlm.cuda.quantize_keys", (queries, byte, 1)),
        ("scales with torch.float32 keys", (queries, queries, 1, "dot", None, None, scales)),
        (
            r"scales are torch.float32 \[1, 3\]",
            (queries, byte, 1, "dot", None, None, scales[:, [0] * 3]),
        ),
        ("valid are torch.float32", (queries, queries, 1, "dot", scales)),
        (
            r"last are torch.int64 \[1, 1\]",
            (queries, queries, 1, "dot", None, (places, places, places[:, :1])),
        ),
        ("keys are on meta and queries on cpu", (queries, queries.to("meta"), 1)),
    ):
        with pytest.raises(UserError, match=message) as raised:
            topk_search(*arguments)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="quantize_keys: keys are torch.int8"):
        quantize_keys(byte)
