"""The Triton selection of product keys on a real card; skipped without a GPU."""

import pytest
import torch

from memlm.cuda import product_key_select
from memlm.cuda.product_key import reference
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def drawn(tokens, heads, n, half, dtype, levels=None, repeated=False):
    """Queries and keys: normal, or of few levels, whose scores float32 adds up without rounding."""
    generator = torch.Generator("cuda").manual_seed(tokens + n + half)

    def draw(*shape):
        if levels is None:
            return torch.randn(*shape, generator=generator, device="cuda")
        return torch.randint(-levels, levels, shape, generator=generator, device="cuda") / 1024

    query, sub_keys = draw(tokens, heads, 2, half), draw(heads, 2, n, half)
    if repeated:  # every key several times
        places = torch.randint(0, n // 3 + 1, (n,), generator=generator, device="cuda")
        sub_keys = sub_keys[:, :, places]
    return query.to(dtype), sub_keys.to(dtype)


def half_scores(query, sub_keys, indices):
    """Scores of the chosen slots in float64, from the half keys they name."""
    n = sub_keys.shape[2]
    scores = torch.einsum("thpd,hpnd->thpn", query.double(), sub_keys.double())
    halves = torch.stack((indices // n, indices % n), 2).long()
    return scores.gather(-1, halves).sum(2)


# Few tokens in chunks of lists, fewer than fill a card, and many.
@pytest.mark.parametrize("tokens", [1, 20, 1500, 20_000])
@pytest.mark.parametrize("n, half, k", [(1024, 256, 32), (100, 48, 64), (130, 9, 7), (512, 96, 1)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_selects_in_the_order_of_the_reference(gpu, tokens, n, half, k, dtype):
    # The widest sums: 256 products of 6-bit numbers have 20 bits.
    query, sub_keys = drawn(tokens, 4, n, half, dtype, 60, repeated=tokens == 1500)
    with poisoned():
        indices, weights = product_key_select(query, sub_keys, k)
    rows = torch.arange(0, tokens, max(1, tokens // 10), device="cuda")
    expected, expected_weights = reference.forward(query[rows], sub_keys, k)
    assert torch.equal(indices[rows], expected)
    torch.testing.assert_close(weights[rows], expected_weights)


@pytest.mark.parametrize("key_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("query_dtype", [BF16, FP16, FP32])
def test_every_type_is_scored_in_float32(gpu, query_dtype, key_dtype):
    query = drawn(3000, 4, 256, 128, query_dtype)[0]
    sub_keys = drawn(3000, 4, 256, 128, key_dtype)[1]
    indices, weights = product_key_select(query, sub_keys, 32)
    chosen = half_scores(query, sub_keys, indices)
    scores = torch.einsum("thpd,hpnd->thpn", query.double(), sub_keys.double())
    best = scores.topk(32).values
    best = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2).topk(32).values
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-4)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert_near({"weights": weights}, {"weights": chosen.softmax(-1)}, 1e-4)


@pytest.mark.parametrize("tokens, half", [(5, 256), (3000, 96), (3000, 256)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_gradients_are_those_of_the_formula(gpu, dtype, tokens, half):
    query, sub_keys = (t.requires_grad_() for t in drawn(tokens, 4, 256, half, dtype))
    with poisoned():
        indices, weights = product_key_select(query, sub_keys, 32)
        grad = torch.randn_like(weights)
        found = torch.autograd.grad(weights, (query, sub_keys), grad)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (query, sub_keys)]
    expected = half_scores(*doubles, indices).softmax(-1)
    expected = torch.autograd.grad(expected, doubles, grad.double())
    # Weights come from float32 scores of size 16; their errors are those of the gradients too.
    for name, one, other in zip(("dquery", "dkeys"), found, expected, strict=True):
        assert one.dtype == dtype
        assert_near({name: one}, {name: other}, max(TOLERANCE[dtype], 1e-4))


def test_scores_that_are_not_numbers(gpu):
    query, sub_keys = drawn(3000, 2, 256, 64, BF16)
    query[3, 1, 0, 2], query[4, 0, 1, 0], query[5], query[6] = torch.nan, torch.inf, 0.0, -0.0
    indices, weights = product_key_select(query, sub_keys, 8)
    assert (indices >= 0).all() and (indices < 256 * 256).all()
    assert weights[3, 1].isnan().all() and weights[7:].isfinite().all()
    first = torch.arange(8, dtype=torch.int32, device="cuda")
    assert (indices[5:7] == first).all()


def test_two_runs_give_the_same_bits(gpu):
    query, sub_keys = (t.requires_grad_() for t in drawn(4000, 4, 1024, 256, BF16))

    def run():
        indices, weights = product_key_select(query, sub_keys, 32)
        dquery, dkeys = torch.autograd.grad(weights.square().sum(), (query, sub_keys))
        return {"indices": indices, "weights": weights, "dquery": dquery, "dkeys": dkeys}

    assert_deterministic(run)


def test_offsets_beyond_32_bits(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 30 << 30:
        pytest.skip(f"needs 30 GiB of free GPU memory, there are {free >> 30}")
    query, sub_keys = drawn(1, 4, 256, 256, BF16)
    query = torch.randn(1_100_000, *query.shape[1:], dtype=BF16, device="cuda")
    assert query.numel() > 2**31
    indices, weights = product_key_select(query, sub_keys, 32)
    alone, weights_alone = product_key_select(query[-40_000:], sub_keys, 32)
    assert torch.equal(indices[-40_000:], alone)
    assert torch.equal(weights[-40_000:], weights_alone)
