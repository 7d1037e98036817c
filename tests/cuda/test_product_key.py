import pytest
import torch

from memlm.cuda import product_key_select, weighted_bag
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.product_key import eager, reference
from memlm.errors import UserError

IMPLEMENTATIONS = ("reference", "eager")


def problem(tokens=7, heads=3, n=9, half=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, heads, 2, half, generator=generator, dtype=dtype)
    sub_keys = torch.randn(heads, 2, n, half, generator=generator, dtype=dtype)
    return query, sub_keys


def brute_force(query, sub_keys, k):
    """Sorted python tuples of all slots, straight from the definition of the order."""
    chosen = []
    for t in range(query.shape[0]):
        for h in range(query.shape[1]):
            halves = [(sub_keys[h, p] @ query[t, h, p]).tolist() for p in (0, 1)]
            ranks = []
            for half in halves:
                order = sorted(range(len(half)), key=lambda i, half=half: (-half[i], i))
                ranks.append({index: rank for rank, index in enumerate(order)})
            n = len(halves[0])
            slots = sorted(
                (-(halves[0][i] + halves[1][j]), ranks[0][i], ranks[1][j], i * n + j)
                for i in range(n)
                for j in range(n)
            )
            chosen.append([slot[-1] for slot in slots[:k]])
    return torch.tensor(chosen).view(*query.shape[:2], k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n, k", [(1, 1), (4, 4), (9, 1), (9, 5), (33, 32)])
def test_selects_what_scoring_every_slot_selects(monkeypatch, implementation, n, k):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = problem(n=n)
    indices, weights = product_key_select(query, sub_keys, k)
    expected = brute_force(query, sub_keys, k)
    assert indices.dtype == torch.int32 and indices.shape == (7, 3, k)
    assert torch.equal(indices.long(), expected)
    scores = torch.einsum("thpd,hpnd->thpn", query, sub_keys)
    every_slot = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    torch.testing.assert_close(weights, every_slot.gather(-1, expected).softmax(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_have_one_order(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(1)
    # Few integer values: equal scores everywhere, and exact in floating point.
    query = torch.randint(-1, 2, (20, 2, 2, 3), generator=generator).float()
    sub_keys = torch.randint(-1, 2, (2, 2, 12, 3), generator=generator).float()
    indices, _ = product_key_select(query, sub_keys, 8)
    assert torch.equal(indices.long(), brute_force(query, sub_keys, 8))


def test_implementations_agree_with_their_gradients():
    query, sub_keys = (tensor.requires_grad_() for tensor in problem(n=17))
    grad = torch.randn(7, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for module in (reference, eager):
        indices, weights = module.product_key_select(query, sub_keys, 6)
        results.append((indices, weights, *torch.autograd.grad(weights, (query, sub_keys), grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][2].abs().sum() > 0 and results[0][3].abs().sum() > 0
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("module", [reference, eager])
def test_selection_gradient(module):
    query, sub_keys = (tensor.requires_grad_() for tensor in problem(tokens=2, heads=2, n=5))
    assert torch.autograd.gradcheck(
        lambda q, keys: module.product_key_select(q, keys, 3)[1], (query, sub_keys)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_is_scored_in_float32(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = problem(tokens=64, n=33, dtype=torch.bfloat16)
    expected = brute_force(query.float(), sub_keys.float(), 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=implementation == "eager"):
        indices, weights = product_key_select(query, sub_keys, 4)
    assert weights.dtype == torch.float32
    assert torch.equal(indices.long(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = problem(tokens=0)
    indices, weights = product_key_select(query, sub_keys, 4)
    assert indices.shape == weights.shape == (0, 3, 4)
    values = torch.randn(81, 6, dtype=torch.float64)
    assert weighted_bag(indices.flatten(1), weights.flatten(1), values).shape == (0, 6)


def test_impossible_sizes():
    query, sub_keys = problem(n=9)
    for k in (0, 10):
        with pytest.raises(UserError, match=f"k = {k} must lie in 1..9"):
            product_key_select(query, sub_keys, k)
    with pytest.raises(UserError, match="65536 half keys"):
        product_key_select(query, torch.empty(3, 2, 65536, 5, device="meta"), 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bag_and_its_gradients(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 6, (5, 4), generator=generator, dtype=torch.int32)
    indices[0] = 2  # the same row several times in one bag
    weights = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    out = weighted_bag(indices, weights, values)
    for t in range(5):
        expected = sum(weights[t, b] * values[indices[t, b]] for b in range(4))
        torch.testing.assert_close(out[t], expected)
    assert torch.autograd.gradcheck(lambda w, v: weighted_bag(indices, w, v), (weights, values))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bag_keeps_the_dtype_of_the_table(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    values = torch.randn(6, 3).bfloat16()
    assert weighted_bag(torch.zeros(2, 4, dtype=torch.int32), torch.rand(2, 4), values).dtype == (
        torch.bfloat16
    )
