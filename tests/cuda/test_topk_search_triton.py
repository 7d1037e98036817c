"""The Triton kernels of the search, in Triton's interpreter."""

import itertools

import pytest
import torch

from memlm.cuda import topk_search
from memlm.cuda.dispatch import VARIABLE, interpreting
from memlm.cuda.topk_search import quantize_keys, reference, triton_limits
from tests.cuda.harness import assert_deterministic, poisoned, scattered

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

problem = pytest.importorskip("memlm.cuda.topk_search.triton_problem")
repair = pytest.importorskip("memlm.cuda.topk_search.triton_repair")
search = pytest.importorskip("memlm.cuda.topk_search.triton_search")

FP16, BF16, FP32, INT8 = torch.float16, torch.bfloat16, torch.float32, torch.int8


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few lanes with many keys each, so that results share lanes, which are looked through."""
    monkeypatch.setattr(problem, "ENOUGH_PROGRAMS", 4)
    monkeypatch.setattr(problem, "MOST_LANES", 64)
    monkeypatch.setattr(repair, "MOST_KEYS", 1)
    monkeypatch.setenv(VARIABLE, "triton")


@pytest.fixture
def calls(monkeypatch):
    """Counts searches, lanes looked through again, and slices that eager had to search."""
    counted = {"lanes": 0, "eager": 0}
    look, eager = repair._look_through, search.eager.topk_search

    def looking(pairs, *rest):
        counted["lanes"] += len(pairs)
        return look(pairs, *rest)

    def searching(*given):
        counted["eager"] += 1
        return eager(*given)

    monkeypatch.setattr(repair, "_look_through", looking)
    monkeypatch.setattr(search.eager, "topk_search", searching)
    return counted


def grid(*shape, levels=3, seed=0, dtype=FP32):
    """Whole numbers, whose products float32 adds up without rounding, with many ties."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-levels, levels + 1, shape, generator=generator).to(dtype)


def hidden(batch, tokens, stored, valid, causal):
    """What hides keys: a mask, and positions of a ring that was written round once."""
    generator = torch.Generator().manual_seed(stored)
    mask = torch.rand(batch, stored, generator=generator) < 0.6 if valid else None
    if not causal:
        return {"valid": mask}
    last = torch.arange(tokens).expand(batch, -1) * (stored + 40) // tokens
    positions = torch.arange(stored).roll(stored // 3).expand(batch, -1)
    return {"valid": mask, "positions": (positions, (last - stored // 2).clamp(min=0), last)}


def assert_same(queries, keys, k, metric="dot", **given):
    with poisoned():
        scores, indices = topk_search(queries, keys, k, metric, **given)
    hiding = given.get("valid"), given.get("positions"), given.get("scales")
    expected_scores, expected = reference.topk_search(queries, keys, k, metric, *hiding)
    assert scores.dtype == FP32 and indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    assert torch.equal(scores, expected_scores)


# Rows, queries, keys, channels, k: the three sizes of tiles, sizes that divide nothing.
SIZES = [
    (2, 5, 300, 16, 4),
    (1, 1, 900, 8, 130),
    (2, 20, 160, 17, 3),
    (1, 70, 100, 64, 8),
    (1, 130, 70, 80, 3),
    (2, 3, 31, 5, 40),  # more results than keys
    (1, 2, 1, 3, 1),
]
HIDING = [
    ("dot", False, False),
    ("dot", True, False),
    ("dot", False, True),
    ("l2", False, False),
    ("l2", True, True),
]


@pytest.mark.parametrize(
    ("sizes", "metric", "valid", "causal"),
    [
        (sizes, *hiding)
        for row, sizes in enumerate(SIZES)
        for column, hiding in enumerate(HIDING)
        if (row + column) % len(HIDING) < 2 or row == 0
    ],
    ids=str,
)
def test_finds_what_the_reference_finds(sizes, metric, valid, causal):
    batch, tokens, stored, channels, k = sizes
    queries = grid(batch, tokens, channels, dtype=FP16)
    keys = grid(batch, stored, channels, seed=1, dtype=FP16)
    assert_same(queries, keys, k, metric, **hidden(batch, tokens, stored, valid, causal))


def test_lanes_that_hide_results_are_looked_through(calls):
    # Of the best of 64 lanes with 16 keys, many are in one lane; scores differ or are equal.
    for levels in (1, 100):
        assert_same(grid(1, 5, 8, levels=levels), grid(1, 1024, 8, levels=levels, seed=1), 20)
        assert calls["lanes"] > 0
        calls["lanes"] = 0
    # All equal: the first keys are the best of different lanes.
    assert_same(grid(1, 5, 8), torch.ones(1, 1024, 8), 20)
    assert calls == {"lanes": 0, "eager": 0}


def test_lanes_are_looked_through_a_few_at_a_time(monkeypatch, calls):
    monkeypatch.setattr(repair, "NUMBERS", 1)
    assert_same(grid(2, 6, 8, levels=50), grid(2, 600, 8, levels=50, seed=1), 20, "l2")
    assert calls["lanes"] > 2


def test_the_best_of_every_query_are_in_one_lane(calls):
    keys = grid(2, 1280, 8)
    keys[:, 5::64] = 20
    assert_same(grid(2, 3, 8).abs() + 1, keys, 15)
    assert calls["lanes"] >= 6 and calls["eager"] == 0


def test_where_too_much_is_doubtful_everything_is_searched_anew(monkeypatch, calls):
    monkeypatch.setattr(repair, "MOST_KEYS", 0)
    queries, keys = grid(2, 3, 8, dtype=FP16), grid(2, 600, 8, seed=1)
    assert_same(queries, keys, 20, **hidden(2, 3, 600, True, True))
    assert_same(queries, keys.to(INT8), 20, scales=torch.full((2, 600), 0.5))
    assert calls == {"lanes": 0, "eager": 2}


def test_more_results_than_lanes(calls):
    assert_same(grid(2, 3, 8), grid(2, 300, 8, seed=1), 90)
    assert calls["lanes"] > 0


def test_one_lane_of_each_key_leaves_nothing_in_doubt(monkeypatch, calls):
    monkeypatch.setattr(problem, "ENOUGH_PROGRAMS", 1000)
    assert_same(grid(1, 3, 8), grid(1, 400, 8, seed=1), 40)
    assert calls == {"lanes": 0, "eager": 0}


@pytest.mark.parametrize(
    ("query_type", "key_type"),
    [
        pytest.param(
            *types, marks=[] if FP16 in types or types[0] == types[1] else [pytest.mark.slow]
        )
        for types in itertools.product(triton_limits.QUERY_TYPES, triton_limits.KEY_TYPES)
    ],
    ids=str,
)
def test_types(query_type, key_type):
    queries, keys = grid(2, 3, 24, dtype=query_type), grid(2, 150, 24, seed=1).to(key_type)
    scales = None
    if key_type == INT8:
        scales = 2.0 ** grid(2, 150)
    for metric in ("dot", "l2"):
        assert_same(queries, keys, 7, metric, scales=scales)


@pytest.mark.parametrize(
    ("metric", "query_type", "key_type"),
    [
        ("dot", FP32, FP32),
        ("dot", FP16, FP32),
        ("cosine", FP32, FP16),
        ("cosine", FP16, FP16),
        ("l2", FP32, FP32),
        ("l2", FP16, FP16),
    ],
    ids=str,
)
def test_scores_are_as_exact_as_float32(query_type, key_type, metric):
    queries, keys = torch.randn(1, 4, 128).to(query_type), torch.randn(1, 200, 128).to(key_type)
    scores, indices = topk_search(queries, keys, 9, metric)
    expected, places = reference.topk_search(
        queries.double(), keys.double(), 9, metric, *3 * [None]
    )
    torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(indices, places)


def test_cosine_of_quantized_keys_ignores_scales():
    queries, (keys, scales) = torch.randn(1, 4, 33), quantize_keys(torch.randn(1, 300, 33))
    scores, indices = topk_search(queries, keys, 9, "cosine", scales=scales)
    expected, places = reference.topk_search(queries, keys, 9, "cosine", None, None, scales)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(indices, places)


def test_wide_numbers_need_all_their_parts():
    # 20 bits by 4 bits; two parts would drop the last.
    queries, keys = grid(1, 3, 1, levels=1 << 20), grid(1, 200, 1, levels=7, seed=1)
    assert_same(queries, keys, 9)
    assert_same(keys[:, :3], grid(1, 200, 1, levels=1 << 20), 9)


def test_zero_vectors_have_an_order():
    for metric in ("dot", "cosine"):
        scores, indices = topk_search(torch.zeros(1, 2, 8), torch.randn(1, 200, 8), 5, metric)
        assert (scores == 0).all() and torch.equal(indices, torch.arange(5).expand(1, 2, 5))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scores_that_are_not_numbers_are_not_found():
    queries, keys = grid(1, 4, 8), grid(1, 300, 8, seed=1)
    queries[0, 1] = torch.nan
    keys[0, 7], keys[0, 100], keys[0, 200] = torch.nan, torch.inf, -torch.inf
    queries = queries.where(queries != 0, 1.0)  # infinity times zero is no number
    assert_same(queries, keys, 6, valid=torch.arange(300)[None] != 100)
    scores, indices = topk_search(queries, keys, 6)
    assert (indices[0, 1] == -1).all() and not (indices == 7).any() and not scores.isnan().any()


def test_nothing_to_search():
    for tokens, stored in ((0, 5), (5, 0), (0, 0)):
        scores, indices = topk_search(torch.zeros(2, tokens, 4), torch.zeros(2, stored, 4), 3)
        assert scores.shape == indices.shape == (2, tokens, 3)
        assert (scores == -torch.inf).all() and (indices == -1).all()
    assert_same(grid(1, 3, 4), grid(1, 200, 4), 2, valid=torch.zeros(1, 200, dtype=torch.bool))


def test_slices_of_rows_and_queries(monkeypatch):
    queries, keys = grid(3, 40, 8), grid(3, 100, 8, seed=1)
    given = hidden(3, 40, 100, True, True)
    monkeypatch.setattr(search, "WORKSPACE", 1)  # 64 queries at a time
    assert_same(queries, keys, 3, **given)
    queries = grid(2, 300, 8)
    assert_same(queries, keys[:2], 3, **hidden(2, 300, 100, True, True))


def test_stores_that_do_not_lie_side_by_side():
    queries, keys = grid(3, 4, 8), grid(3, 200, 8, seed=1)
    assert_same(queries, scattered(keys), 5)
    assert_same(queries, keys[:, 20:170], 5)
    assert_same(queries, keys[:1].expand(3, -1, -1), 5, "l2")
    valid = scattered((grid(3, 200) > 0).float()) > 0
    assert_same(scattered(queries), keys, 5, valid=valid)


def test_tiles_that_no_query_of_a_block_sees_are_left_out():
    tiles = problem.Tiles(block_m=16, block_n=64, splits=3, per_split=2, warps=4)
    positions = torch.arange(330)[None]  # 6 tiles, the last of which is not full
    first = torch.arange(20)[None] + 70
    given = positions, first, first + 60  # 16 queries see 70..144, 4 see 86..148
    keys = torch.zeros(1, 330, 8)
    store = problem.Store.prepare(keys, "dot", None, given, None, tiles.block_n)
    asked = problem.Queries.prepare(torch.zeros(1, 20, 8), FP32, "dot", given[1:])
    reach = search._reach(asked, store, tiles)
    assert reach.shape == (1, 2, 3, 2) and reach.dtype == torch.int32
    for block in range(2):
        seen = [list(range(*reach[0, block, split])) for split in range(3)]
        assert seen == [[1], [2], []]


def test_two_runs_give_the_same_bits():
    queries, keys = torch.randn(1, 20, 40), torch.randn(1, 300, 40)
    assert_deterministic(lambda: dict(zip("si", topk_search(queries, keys, 9), strict=True)))


def test_packed_scores():
    scores = torch.tensor([-torch.inf, -3.5, -0.0, 0.0, 1e-40, 2.0, torch.inf, torch.nan])
    packed = repair.pack(scores, torch.arange(8))
    found, places = repair.scores_and_places(packed.sort(descending=True).values)
    assert places.tolist() == [6, 5, 4, 2, 3, 1, -1, -1]
    assert torch.equal(found[:6], scores[places[:6]]) and (found[6:] == -torch.inf).all()


def test_what_is_refused():
    queries, keys = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    refusal = triton_limits.triton_refusal
    assert refusal(queries, keys, 512) is None
    assert "k is 513" in refusal(queries, keys, 513)
    assert "queries are float64" in refusal(queries.double(), keys, 1)
    assert "keys are float64" in refusal(queries, keys.double(), 1)
    many = torch.empty(1, 2**31, 4, device="meta")
    assert "a store has 2147483648" in refusal(queries, many, 1)
    with pytest.raises(RuntimeError, match="k is 513, the kernels find up to 512"):
        topk_search(queries, keys, 513)
