import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.cuda import topk_search
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.topk_search import eager, reference
from memlm.errors import UserError

IMPLEMENTATIONS = ("reference", "eager")


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
@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_finds_the_nearest(monkeypatch, blocks, implementation, metric, k):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 13, 3, generator=generator, dtype=torch.float64)
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
        assert torch.equal(indices, expected), name
        torch.testing.assert_close(scores, expected_scores)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 9),
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "QUERY_BLOCK", query_block)
        patch.setattr(eager, "KEY_BLOCK", key_block)
        for search in (reference.topk_search, eager.topk_search):
            scores, indices = search(queries, keys, k, "dot", None, positions)
            assert torch.equal(indices, expected[1])
            assert torch.equal(scores, expected[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_is_scored_in_float32_without_gradient(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(1, 40, 16, generator=generator).bfloat16().requires_grad_()
    keys = torch.randn(1, 200, 16, generator=generator).bfloat16()
    scores, indices = topk_search(queries, keys, 3)
    expected = (queries.float() @ keys.float().transpose(1, 2)).topk(3)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.equal(indices, expected.indices)


def test_rows_search_only_their_own_store():
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(3, 4, 8, generator=generator)
    keys = torch.randn(3, 10, 8, generator=generator)
    together = topk_search(queries, keys, 4)
    for row in range(3):
        alone = topk_search(queries[row : row + 1], keys[row : row + 1], 4)
        assert torch.equal(together[1][row : row + 1], alone[1])


def test_bad_arguments():
    queries = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match="'cosin' is not one of.*did you mean 'cosine'"):
        topk_search(queries, queries, 1, "cosin")
    with pytest.raises(UserError, match="k = 0 must be at least 1"):
        topk_search(queries, queries, 0)
