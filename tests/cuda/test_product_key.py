import pytest
import torch

from memlm.cuda import product_key_select
from memlm.cuda.dispatch import VARIABLE
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_formula(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = (tensor.requires_grad_() for tensor in problem(n=17))
    grad = torch.randn(7, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    indices, weights = product_key_select(query, sub_keys, 6)
    found = torch.autograd.grad(weights, (query, sub_keys), grad)
    scores = torch.einsum("thpd,hpnd->thpn", query, sub_keys)
    every_slot = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    expected = every_slot.gather(-1, indices.long()).softmax(-1)
    expected = torch.autograd.grad(expected, (query, sub_keys), grad)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selection_gradient(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = (tensor.requires_grad_() for tensor in problem(tokens=2, heads=2, n=5))
    assert torch.autograd.gradcheck(
        lambda q, keys: product_key_select(q, keys, 3)[1], (query, sub_keys)
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


def test_impossible_sizes():
    query, sub_keys = problem(n=9)
    for k in (0, 10):
        with pytest.raises(UserError, match=f"k = {k} must lie in 1..9"):
            product_key_select(query, sub_keys, k)
    with pytest.raises(UserError, match="65536 half keys"):
        product_key_select(query, torch.empty(3, 2, 65536, 5, device="meta"), 4)
