import pytest
import torch

from memlm.cuda import product_key_select
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.product_key import native
from memlm.errors import UserError
from tests.cuda.harness import TOLERANCE, assert_near

NATIVE = pytest.mark.native(native.SOURCE)
IMPLEMENTATIONS = ("reference", "eager", pytest.param("native", marks=NATIVE))


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


def exact_problem(tokens, heads, n, half, seed=0, levels=1024, repeated=False):
    """Queries and keys whose scores float32 computes without rounding, in any order of summing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-levels, levels, shape, generator=generator) / 1024

    query, sub_keys = draw(tokens, heads, 2, half), draw(heads, 2, n, half)
    if repeated:  # every key several times
        sub_keys = sub_keys[:, :, torch.randint(0, n // 3 + 1, (n,), generator=generator)]
    return query, sub_keys.contiguous()


def every_score(query, sub_keys):
    scores = torch.einsum("thpd,hpnd->thpn", query, sub_keys)
    return (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)


def assert_selects_as_brute_force(query, sub_keys, k, indices, weights):
    """The k best of all n * n scores, whole sets and scores."""
    scores = every_score(query.double(), sub_keys.double())
    best = scores.topk(k).values
    chosen = scores.gather(-1, indices.long())
    assert torch.equal(chosen, best)  # so the sets are equal but for equal scores
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(weights.double(), best.softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n, k", [(16, 1), (16, 16), (33, 7), (64, 32), (128, 32), (100, 64)])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=NATIVE)])
def test_ten_thousand_queries_select_what_brute_force_selects(monkeypatch, implementation, n, k):
    monkeypatch.setenv(VARIABLE, implementation)
    for part, kind in enumerate(("plain", "plain", "plain", "ties", "repeated")):
        levels = 3 if kind == "ties" else 1024
        query, sub_keys = exact_problem(500, 4, n, 6, part, levels, kind == "repeated")
        indices, weights = product_key_select(query, sub_keys, k)
        assert_selects_as_brute_force(query, sub_keys, k, indices, weights)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8, 32, 64])
@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=NATIVE)])
def test_large_tables_select_what_brute_force_selects(monkeypatch, implementation, n, k):
    monkeypatch.setenv(VARIABLE, implementation)
    for part in range(313):  # 10,016 queries
        query, sub_keys = exact_problem(8, 4, n, 6, part, repeated=part % 3 == 2)
        indices, weights = product_key_select(query, sub_keys, k)
        assert_selects_as_brute_force(query, sub_keys, k, indices, weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plain", "ties", "repeated"])
@pytest.mark.parametrize("n, k", [(1, 1), (4, 4), (9, 1), (9, 5), (33, 32)])
def test_order_of_the_selected(monkeypatch, implementation, n, k, kind):
    monkeypatch.setenv(VARIABLE, implementation)
    levels = 3 if kind == "ties" else 1024
    query, sub_keys = exact_problem(7, 3, n, 5, 0, levels, kind == "repeated")
    indices, weights = product_key_select(query, sub_keys, k)
    expected = brute_force(query, sub_keys, k)
    assert indices.dtype == torch.int32 and indices.shape == (7, 3, k)
    assert torch.equal(indices.long(), expected)
    weights_of_all = every_score(query, sub_keys).gather(-1, expected).softmax(-1)
    torch.testing.assert_close(weights, weights_of_all)


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
    dtype = torch.float32 if implementation == "native" else torch.float64
    for sizes in ({"n": 17}, {"tokens": 40, "heads": 2, "n": 12, "half": 136}):
        query, sub_keys = (t.requires_grad_() for t in problem(dtype=dtype, **sizes))
        generator = torch.Generator().manual_seed(2)
        grad = torch.randn(*query.shape[:2], 6, dtype=torch.float64, generator=generator)
        indices, weights = product_key_select(query, sub_keys, 6)
        found = torch.autograd.grad(weights, (query, sub_keys), grad.to(dtype))
        doubles = [tensor.detach().double().requires_grad_() for tensor in (query, sub_keys)]
        expected = every_score(*doubles).gather(-1, indices.long()).softmax(-1)
        expected = torch.autograd.grad(expected, doubles, grad)
        for one, other in zip(found, expected, strict=True):
            assert other.abs().sum() > 0
            assert_near({"gradient": one}, {"gradient": other}, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "eager"])
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
    with torch.autocast("cpu", torch.bfloat16, enabled=implementation != "reference"):
        indices, weights = product_key_select(query, sub_keys, 4)
    assert weights.dtype == torch.float32
    assert torch.equal(indices.long(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    query, sub_keys = problem(tokens=0, dtype=torch.float32)
    indices, weights = product_key_select(query, sub_keys, 4)
    assert indices.shape == weights.shape == (0, 3, 4)


@pytest.mark.parametrize(
    "query, sub_keys",
    [
        ((3, 2, 2, 8), (2, 2, 5, 4)),
        ((3, 2, 2, 4), (2, 2, 5, 8)),
        ((3, 4, 2, 4), (2, 2, 5, 4)),
        ((3, 2, 3, 4), (2, 3, 5, 4)),
        ((3, 2, 4), (2, 2, 5, 4)),
    ],
)
def test_shapes_that_do_not_fit(query, sub_keys):
    with pytest.raises(UserError, match="do not fit; they must be"):
        product_key_select(torch.randn(query), torch.randn(sub_keys), 2)


def test_impossible_sizes():
    query, sub_keys = problem(n=9)
    for k in (0, 10):
        with pytest.raises(UserError, match=f"k = {k} must lie in 1..9"):
            product_key_select(query, sub_keys, k)
    with pytest.raises(UserError, match="65536 half keys"):
        product_key_select(query, torch.empty(3, 2, 65536, 5, device="meta"), 4)


@NATIVE
def test_scores_that_are_not_numbers(monkeypatch):
    monkeypatch.setenv(VARIABLE, "native")
    query, sub_keys = problem(tokens=20, n=33, dtype=torch.float32)
    query[3, 1, 0, 2], query[4, 0, 1, 0], query[5, 2] = torch.nan, torch.inf, 0.0
    query[6] = -0.0
    indices, weights = product_key_select(query, sub_keys, 8)
    assert (indices >= 0).all() and (indices < 33 * 33).all()
    assert weights[3, 1].isnan().all() and weights[7:].isfinite().all()
    assert torch.equal(indices[5, 2], torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32))
    assert torch.equal(indices[6, 0], indices[5, 2])


@NATIVE
def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setenv(VARIABLE, "native")
    query, sub_keys = (t.requires_grad_() for t in problem(700, 3, 130, 20, torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            indices, weights = product_key_select(query, sub_keys, 8)
            grads = torch.autograd.grad(weights.square().sum(), (query, sub_keys))
            results.append((indices, weights, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
