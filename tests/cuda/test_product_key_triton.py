"""The Triton kernels of the selection, in Triton's interpreter."""

import pytest
import torch

from memlm.cuda.dispatch import interpreting
from memlm.cuda.product_key import device, operator, reference
from tests.cuda.harness import TOLERANCE, assert_near, poisoned, scattered
from tests.cuda.test_product_key import brute_force, every_score, exact_problem, problem

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

triton_select = pytest.importorskip("memlm.cuda.product_key.triton_select")

# Tokens, heads, half keys, channels of a half, k.
CASES = [
    (3, 2, 33, 5, 7),
    (17, 1, 16, 16, 16),
    (1, 1, 1, 1, 1),
    (2, 1, 64, 20, 1),
    (2, 1, 100, 48, 64),
    (2, 1, 97, 100, 33),
    (1, 1, 130, 9, 40),  # chunks, the last of which has fewer half keys than k
    (2, 1, 140, 9, 6),
]


def select(query, sub_keys, k):
    return operator.ProductKeySelect.apply(query, sub_keys, k, triton_select)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [(sizes, "ties") for sizes in CASES] + [(CASES[n], "repeated") for n in (0, 6)],
    ids=str,
)
def test_selects_in_the_order_of_the_reference(sizes, kind):
    *shape, k = sizes
    levels = 3 if kind == "ties" else 1024
    query, sub_keys = exact_problem(*shape, levels=levels, repeated=kind == "repeated")
    with poisoned():
        indices, weights = select(query, sub_keys, k)
    expected, weights_of_all = reference.forward(query, sub_keys, k)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, weights_of_all)


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(triton_select, "ENOUGH_PROGRAMS", 0)
    query, sub_keys = exact_problem(130, 1, 17, 33, levels=20)
    indices, weights = select(query, sub_keys, 8)
    expected, weights_of_all = reference.forward(query, sub_keys, 8)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, weights_of_all)


@pytest.mark.parametrize(
    ("query_dtype", "key_dtype"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_every_type_is_scored_in_float32(query_dtype, key_dtype):
    query, sub_keys = problem(5, 1, 33, 7, torch.float32)
    query, sub_keys = query.to(query_dtype), sub_keys.to(key_dtype)
    indices, weights = select(query, sub_keys, 6)
    assert torch.equal(indices.long(), brute_force(query.double(), sub_keys.double(), 6))
    scores = every_score(query.double(), sub_keys.double())
    expected = scores.gather(-1, indices.long()).softmax(-1)
    assert_near({"weights": weights}, {"weights": expected}, 1e-6)


def test_three_parts_are_as_exact_as_float32():
    query, sub_keys = problem(4, 1, 64, 128, torch.float32)
    expected = every_score(query.double(), sub_keys.double())
    indices, weights = select(query, sub_keys, 16)
    chosen = expected.gather(-1, indices.long())
    found = weights.double().log() - weights[..., :1].double().log()
    assert (found - (chosen - chosen[..., :1])).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 2, 9, 5), torch.float32),
        ((2, 1, 8, 40), torch.float32),
        ((2, 1, 9, 5), torch.float16),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_formula(sizes, dtype):
    query, sub_keys = (t.to(dtype).requires_grad_() for t in problem(*sizes))
    grad = problem(sizes[0], sizes[1], 1, 3)[0].flatten(2)
    with poisoned():
        indices, weights = select(query, sub_keys, 6)
        found = torch.autograd.grad(weights, (query, sub_keys), grad.float())
    doubles = [tensor.detach().double().requires_grad_() for tensor in (query, sub_keys)]
    expected = every_score(*doubles).gather(-1, indices.long()).softmax(-1)
    expected = torch.autograd.grad(expected, doubles, grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and other.abs().sum() > 0
        assert_near({"gradient": one}, {"gradient": other}, TOLERANCE[dtype])


def test_layout_and_run_change_no_bit():
    query, sub_keys = problem(2, 1, 17, 7, torch.float32)

    def run(query=query, sub_keys=sub_keys):
        inputs = [tensor.detach().requires_grad_() for tensor in (query, sub_keys)]
        indices, weights = select(*inputs, 6)
        dquery, dkeys = torch.autograd.grad(weights.square().sum(), inputs)
        return {"indices": indices, "weights": weights, "dquery": dquery, "dkeys": dkeys}

    first, other = run(), run(scattered(query), scattered(sub_keys))
    assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_scores_that_are_not_numbers():
    query, sub_keys = problem(tokens=8, n=33, dtype=torch.float32)
    query[3, 1, 0, 2], query[4, 0, 1, 0], query[5, 2] = torch.nan, torch.inf, 0.0
    query[6] = -0.0
    indices, weights = select(query, sub_keys, 8)
    assert (indices >= 0).all() and (indices < 33 * 33).all()
    assert weights[3, 1].isnan().all() and weights[7:].isfinite().all()
    assert torch.equal(indices[5, 2], torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32))
    assert torch.equal(indices[6, 0], indices[5, 2])


def test_no_tokens():
    query, sub_keys = (t.requires_grad_() for t in problem(tokens=0, dtype=torch.float32))
    indices, weights = select(query, sub_keys, 4)
    assert indices.shape == weights.shape == (0, 3, 4)
    dquery, dkeys = torch.autograd.grad(weights.sum(), (query, sub_keys))
    assert dquery.shape == query.shape and (dkeys == 0).all()


def test_what_is_refused():
    query, sub_keys = problem(n=70, dtype=torch.float32)
    assert device.triton_refusal(query, sub_keys, 64) is None
    assert "k is 65" in device.triton_refusal(query, sub_keys, 65)
    assert "queries are float64" in device.triton_refusal(query.double(), sub_keys, 4)
    assert "sub_keys are float64" in device.triton_refusal(query, sub_keys.double(), 4)
