"""The Triton kernels of the weighted bag, in Triton's interpreter."""

import pytest
import torch

from memlm.cuda import (
    LazyAdam,
    Reads,
    RowwiseAdagrad,
    gathered_dot,
    row_gradients,
    update_rows,
    weighted_bag,
)
from memlm.cuda.dispatch import VARIABLE, interpreting
from memlm.cuda.weighted_bag import device, refusal
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned, scattered
from tests.cuda.weighted_bag_cases import adamw, formula, outcome, problem

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

# Tokens, length of a bag, rows, width.
CASES = [
    (5, 3, 11, 48),
    (2, 40, 6, 100),
    (2, 17, 20, 384),
    (1, 1, 1, 1),
    (0, 4, 9, 5),
    (6, 0, 4, 7),
]
TYPED = [(torch.float32, sizes) for sizes in CASES] + [(torch.float16, CASES[0])]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")


def hot_reads(counts, dtype=torch.float32, width=20):
    """Reads of rows as often as `counts` says, in random order, in two lists of bags."""
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(5)
    rows = rows[torch.randperm(len(rows), generator=generator)].int()
    count = len(rows) // 5 * 5
    _, weights, _, x, _ = problem(count, 1, 9, width, dtype)
    first, second = rows[:count].view(-1, 5), rows[count:].view(-1, 1)
    weights = weights.view(-1, 5)
    return [
        Reads(first, weights, x[: len(first)]),
        Reads(second, weights[: len(second), :1], x[: len(second)]),
    ]


def exactly(reads):
    return [Reads(part.indices, part.weights.double(), part.grad.double()) for part in reads]


@pytest.mark.parametrize(
    ("dtype", "sizes", "gated"),
    [(*TYPED[n], n % 2 == 0) for n in range(len(TYPED))] + [(*TYPED[0], False)],
    ids=str,
)
def test_bag_and_its_gradients(dtype, sizes, gated):
    indices, weights, values, gate, dout = problem(*sizes, dtype=dtype)
    gate = gate if gated else None
    doubles = (None if t is None else t.double() for t in (weights, values, gate, dout))
    expected = outcome(formula, indices, *doubles)
    with poisoned():
        found = outcome(weighted_bag, indices, weights, values, gate, dout)
    assert found["out"].dtype == dtype
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "sizes"), TYPED, ids=str)
def test_gathered_dot_and_its_gradients(dtype, sizes):
    indices, dout, values, x, _ = problem(*sizes, dtype=dtype)

    def dot(indices, x, values):
        return (values[indices.long()] * x[:, None]).sum(-1)

    expected = outcome(dot, indices, x.double(), values.double(), None, dout.double())
    with poisoned():
        found = outcome(gathered_dot, indices, x, values, None, dout)
    assert found["out"].dtype == torch.float32
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_many_tokens_and_few(monkeypatch, multiprocessors):
    from memlm.cuda.weighted_bag import triton_bag

    monkeypatch.setattr(triton_bag, "multiprocessors", lambda _: multiprocessors)
    indices, weights, values, gate, _ = problem(2, 70, 30, 1100, torch.float32)
    found = weighted_bag(indices, weights, values, gate)
    expected = formula(indices, weights.double(), values.double(), gate.double())
    assert_near({"out": found}, {"out": expected}, TOLERANCE[torch.float32])


def test_arguments_need_not_be_contiguous():
    indices, *others = problem(dtype=torch.float32)
    expected = outcome(weighted_bag, indices, *others)
    wide = indices.new_zeros(indices.shape[0], 2 * indices.shape[1]).long()
    wide[:, ::2] = indices
    found = outcome(weighted_bag, wide[:, ::2], *(scattered(tensor) for tensor in others))
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("width", [20, 130])
def test_rows_with_hundreds_of_reads(monkeypatch, width):
    reads = hot_reads((1, 64, 65, 200, 0, 3, 150, 4), width=width)
    with poisoned():
        rows, gradient = row_gradients(reads, 8)
    monkeypatch.setenv(VARIABLE, "reference")
    expected_rows, expected = row_gradients(exactly(reads), 8)
    assert torch.equal(rows, expected_rows)
    for row, found, exact in zip(rows.tolist(), gradient, expected, strict=True):
        assert_near({row: found}, {row: exact}, TOLERANCE[torch.float32])


@pytest.mark.parametrize("counts", [(700,), (64, 64, 64), (65, 65), (1,) * 66, (640, 64, 129)])
def test_rows_at_the_edges_of_windows(monkeypatch, counts):
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).int()[:, None]
    reads = [Reads(rows, torch.rand(len(rows), 1) + 0.5, torch.randn(len(rows), 3))]
    with poisoned():
        found = row_gradients(reads, 1000)
    monkeypatch.setenv(VARIABLE, "reference")
    expected = row_gradients(exactly(reads), 1000)
    assert torch.equal(found[0], expected[0])
    assert_near({"gradient": found[1]}, {"gradient": expected[1]}, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (LazyAdam, torch.float32),
        (LazyAdam, torch.bfloat16),
        (RowwiseAdagrad, torch.float32),
        (RowwiseAdagrad, torch.float16),
    ],
)
def test_only_rows_that_were_read_change(monkeypatch, rule, dtype):
    reads = hot_reads((1, 3, 65, 4, 0, 2, 66, 1), dtype)
    values = problem(1, 1, 11, 20, dtype)[2]
    found, state = values.clone(), rule.init_state(values)
    exact, exact_state = values.double().clone(), rule.init_state(values.double())
    options = {"learning_rate": 0.1, "eps": 1e-4, "weight_decay": 0.2, "scale": 0.5}
    for step in (1, 2):
        if rule is LazyAdam:
            options |= {"betas": (0.9, 0.99), "step": step}
        with poisoned():
            update_rows(reads, found, state, rule(**options))
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, "reference")
            update_rows(exactly(reads), exact, exact_state, rule(**options))
    untouched = [4, 8, 9, 10]
    assert torch.equal(found[untouched], values[untouched])
    names = {"values": (found, exact)} | {name: (state[name], exact_state[name]) for name in state}
    for name, (one, other) in names.items():
        assert_near({name: one}, {name: other}, TOLERANCE[dtype])
        assert one.dtype == (dtype if name == "values" else torch.float32)


def test_lazy_adam_of_all_rows_is_adamw():
    values = problem(1, 1, 8, 48, torch.float32)[2]
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    steps = []
    for seed in range(2):
        indices, weights, _, _, grad = problem(12, 5, 8, 48, torch.float32, seed)
        steps.append([Reads(indices, weights, grad)])
    assert all(len(reads[0].indices.unique()) == 8 for reads in steps)
    gradients = [row_gradients(reads, 8)[1] for reads in steps]
    expected = adamw(values, gradients, foreach=False, **options)
    found, state = values.clone(), LazyAdam.init_state(values)
    for step, reads in enumerate(steps, 1):
        update_rows(reads, found, state, LazyAdam(0.03, (0.8, 0.95), 1e-6, step, 0.1))
    assert_near({"values": found}, {"values": expected}, TOLERANCE[torch.float32] / 10)


def test_two_runs_are_equal():
    given = problem(9, 16, 2, 40, torch.float32)
    assert_deterministic(lambda: outcome(weighted_bag, *given))


def test_reads_without_a_read_change_nothing():
    values = torch.randn(4, 3)
    before, state = values.clone(), RowwiseAdagrad.init_state(values)
    empty = Reads(torch.zeros(5, 0, dtype=torch.int32), torch.zeros(5, 0), torch.ones(5, 3))
    update_rows([empty], values, state, RowwiseAdagrad(0.1, 1e-8))
    assert torch.equal(values, before)
    rows, gradient = row_gradients([empty], 4)
    assert rows.dtype == torch.int64 and rows.shape == (0,) and gradient.shape == (0, 3)


@pytest.mark.parametrize(
    "table, reason",
    [
        (torch.empty(2, 3, dtype=torch.float64), "the table is float64"),
        (torch.empty(2, device.MAX_WIDTH + 1), "a row has 8193 channels"),
        (torch.empty(2**31, 1, device="meta"), "2147483648 rows"),
    ],
    ids=["type", "width", "rows"],
)
def test_tables_they_do_not_take(table, reason):
    assert reason in refusal("triton", table)
