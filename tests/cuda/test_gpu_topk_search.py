"""The Triton search on a real card; skipped without a GPU."""

import pytest
import torch

from memlm.cuda import quantize_keys, topk_search
from memlm.cuda.topk_search import reference
from tests.cuda.harness import assert_deterministic, poisoned

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def grid(*shape, levels=7, seed=0, dtype=FP32):
    """Whole numbers, whose products float32 adds up without rounding, with many ties."""
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    drawn = torch.randint(-levels, levels + 1, shape, generator=generator, device="cuda")
    return drawn.to(dtype)


def hidden(batch, tokens, stored):
    """A mask, and positions of a ring that was written round once."""
    generator = torch.Generator("cuda").manual_seed(stored)
    mask = torch.rand(batch, stored, generator=generator, device="cuda") < 0.6
    last = torch.arange(tokens, device="cuda").expand(batch, -1) * (stored + 40) // tokens
    positions = torch.arange(stored, device="cuda").roll(stored // 3).expand(batch, -1)
    return {"valid": mask, "positions": (positions, (last - stored // 2).clamp(min=0), last)}


def assert_same(queries, keys, k, metric="dot", **given):
    """Equal to the reference, which sees a few queries at a time."""
    with poisoned():
        scores, indices = topk_search(queries, keys, k, metric, **given)
    chosen = torch.arange(0, queries.shape[1], max(1, queries.shape[1] // 9), device="cuda")
    positions = given.get("positions")
    if positions is not None:
        positions = (positions[0], positions[1][:, chosen], positions[2][:, chosen])
    expected_scores, expected = reference.topk_search(
        queries[:, chosen], keys, k, metric, given.get("valid"), positions, given.get("scales")
    )
    assert torch.equal(indices[:, chosen], expected)
    assert torch.equal(scores[:, chosen], expected_scores)


# Rows, queries, keys, results: every size of tiles, one part and three, odd numbers of channels.
CASES = [
    ((3, 1, 20_000, 32), 64, BF16, "dot", False),
    ((2, 1, 20_000, 32), 256, FP16, "l2", True),
    ((2, 50, 5000, 7), 100, FP32, "dot", True),
    ((2, 1500, 30_001, 128), 64, BF16, "l2", True),
    ((2, 1500, 30_001, 32), 256, BF16, "dot", False),
    ((1, 2048, 30_001, 32), 256, FP32, "dot", False),
    ((2, 1500, 9000, 16), 768, FP16, "dot", True),
    ((1, 1500, 9000, 16), 100, FP32, "l2", True),
]


@pytest.mark.parametrize("sizes, width, dtype, metric, hiding", CASES, ids=str)
def test_finds_what_the_reference_finds(gpu, sizes, width, dtype, metric, hiding):
    batch, tokens, stored, k = sizes
    queries = grid(batch, tokens, width, dtype=dtype)
    keys = grid(batch, stored, width, seed=1, dtype=dtype)
    assert_same(queries, keys, k, metric, **(hidden(batch, tokens, stored) if hiding else {}))


@pytest.mark.parametrize("levels", [1, 2])
def test_ties_everywhere(gpu, levels):
    queries, keys = grid(2, 700, 2, levels=levels), grid(2, 40_000, 2, levels=levels, seed=1)
    assert_same(queries, keys, 32)
    assert_same(torch.zeros_like(queries), keys, 32)


@pytest.mark.parametrize(
    "query_type, key_type",
    [(BF16, INT8), (FP16, INT8), (FP32, INT8), (FP32, BF16), (FP32, FP16), (BF16, FP32)],
)
def test_types(gpu, query_type, key_type):
    queries, keys = grid(2, 300, 96, dtype=query_type), grid(2, 9000, 96, seed=1).to(key_type)
    scales = 2.0 ** grid(2, 9000, levels=2) if key_type == INT8 else None
    assert_same(queries, keys, 9, scales=scales)


@pytest.mark.parametrize("metric, tokens", [("dot", 400), ("cosine", 1), ("cosine", 400)])
def test_scores_are_as_exact_as_float32(gpu, tokens, metric):
    queries, keys = (torch.randn(1, n, 256, device="cuda") for n in (tokens, 50_000))
    scores, _ = topk_search(queries, keys, 32, metric)
    doubles = queries.double(), keys.double()
    expected, _ = reference.topk_search(*doubles, 32, metric, None, None, None)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_cosine_of_quantized_keys(gpu):
    queries = torch.randn(2, 300, 64, device="cuda")
    keys, scales = quantize_keys(torch.randn(2, 20_000, 64, device="cuda"))
    scores, _ = topk_search(queries, keys, 32, "cosine", scales=scales)
    expected, _ = reference.topk_search(queries, keys, 32, "cosine", None, None, scales)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_scores_that_are_not_numbers_are_not_found(gpu):
    queries, keys = grid(1, 300, 64, dtype=BF16), grid(1, 9000, 64, seed=1, dtype=BF16)
    queries[0, 1], keys[0, 7], keys[0, 200] = torch.nan, torch.nan, -torch.inf
    scores, indices = topk_search(queries, keys, 16)
    assert (indices[0, 1] == -1).all() and (scores[0, 1] == -torch.inf).all()
    assert not (indices == 7).any() and not scores.isnan().any()


def test_two_runs_give_the_same_bits(gpu):
    queries, keys = (torch.randn(2, n, 64, device="cuda", dtype=BF16) for n in (2000, 100_000))
    assert_deterministic(lambda: dict(zip("si", topk_search(queries, keys, 32), strict=True)))


def test_memory_is_not_that_of_a_matrix_of_scores(gpu):
    queries, keys = (torch.randn(1, n, 64, device="cuda", dtype=BF16) for n in (4096, 1 << 19))
    topk_search(queries, keys, 32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    topk_search(queries, keys, 32)
    torch.cuda.synchronize()
    # The lanes take 128 MiB at most, their top-k and what is looked through again a few times that.
    assert torch.cuda.max_memory_allocated() - before < 4096 * (1 << 19) * 4 / 8


def test_offsets_beyond_32_bits(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of free GPU memory, there are {free >> 30}")
    stored = (1 << 31) // 256 + 5000
    keys = torch.zeros(1, stored, 256, dtype=FP16, device="cuda")
    assert keys.numel() > 2**31
    keys[0, -3000:] = torch.randn(3000, 256, device="cuda")
    queries = torch.randn(1, 200, 256, dtype=FP16, device="cuda")
    scores, indices = topk_search(queries, keys, 16)
    alone, places = topk_search(queries, keys[:, -3000:], 16)
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-4)
    assert (indices == places + stored - 3000).double().mean() > 0.999
