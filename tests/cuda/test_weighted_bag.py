import pytest
import torch

from memlm.cuda import (
    LazyAdam,
    PendingReads,
    Reads,
    RowwiseAdagrad,
    gathered_dot,
    row_gradients,
    update_rows,
    weighted_bag,
)
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.weighted_bag import native
from memlm.errors import UserError
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned, scattered
from tests.cuda.weighted_bag_cases import CASES, adamw, formula, outcome, problem

NATIVE = pytest.mark.native(native.SOURCE)
IMPLEMENTATIONS = ("reference", "eager", pytest.param("native", marks=NATIVE))


def kinds(*dtypes):
    """Implementations with the types they take."""
    return pytest.mark.parametrize(
        "implementation, dtype",
        [
            pytest.param(name, dtype, marks=NATIVE if name == "native" else ())
            for name in ("reference", "eager", "native")
            for dtype in dtypes
            if name != "native" or dtype == torch.float32
        ],
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", CASES, ids=str)
@kinds(torch.float64, torch.float32, torch.bfloat16, torch.float16)
def test_bag_and_its_gradients(monkeypatch, implementation, dtype, sizes, gated):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, weights, values, gate, dout = problem(*sizes, dtype=dtype)
    gate = gate if gated else None
    doubles = (None if t is None else t.double() for t in (weights, values, gate, dout))
    expected = outcome(formula, indices, *doubles)
    with poisoned():
        found = outcome(weighted_bag, indices, weights, values, gate, dout)
    assert found["out"].dtype == dtype
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", CASES, ids=str)
@kinds(torch.float64, torch.float32, torch.bfloat16)
def test_gathered_dot_and_its_gradients(monkeypatch, implementation, dtype, sizes):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, dout, values, x, _ = problem(*sizes, dtype=dtype)

    def dot(indices, x, values):
        return (values[indices.long()] * x[:, None]).sum(-1)

    expected = outcome(dot, indices, x.double(), values.double(), None, dout.double())
    found = outcome(gathered_dot, indices, x, values, None, dout)
    assert found["out"].dtype == torch.promote_types(dtype, torch.float32)
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "eager"])
def test_gradcheck(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, *leaves, _ = problem()
    weights, values, gate = (tensor.requires_grad_() for tensor in leaves)
    assert torch.autograd.gradcheck(
        lambda w, v, g: weighted_bag(indices, w, v, g), (weights, values, gate)
    )
    assert torch.autograd.gradcheck(lambda x, v: gathered_dot(indices, x, v), (gate, values))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_need_not_be_contiguous(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    given = problem(dtype=torch.float32)
    expected = outcome(weighted_bag, *given)
    indices = scattered(given[0].float()).int()
    wide = indices.new_zeros(indices.shape[0], 2 * indices.shape[1])
    wide[:, ::2] = indices
    found = outcome(weighted_bag, wide[:, ::2], *(scattered(tensor) for tensor in given[1:]))
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_equal(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    given = problem(300 if implementation != "reference" else 30, 16, 21, 40, torch.float32)
    assert_deterministic(lambda: outcome(weighted_bag, *given))


@kinds(torch.float64, torch.float32)
def test_pending_reads_are_the_gradient(monkeypatch, implementation, dtype):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, weights, values, gate, dout = problem(rows=40, dtype=dtype)
    expected = outcome(weighted_bag, indices, weights, values, gate, dout)["values"]
    pending = PendingReads(len(values))
    leaf = values.clone().requires_grad_()
    weighted_bag(indices, weights, leaf, gate, pending).backward(dout)
    assert leaf.grad is None and pending.nbytes > 0
    rows, gradient = row_gradients(pending.take(), len(values))
    assert pending.take() == []
    assert torch.equal(rows, indices.unique().long())
    torch.testing.assert_close(gradient, expected[rows])
    untouched = torch.ones(len(values), dtype=torch.bool)
    untouched[rows] = False
    assert untouched.any() and not expected[untouched].any()


def test_pending_reads_never_outgrow_the_table():
    pending = PendingReads(8)
    total = torch.zeros(8, 6, dtype=torch.float64)
    for seed in range(40):
        indices, weights, _, _, grad = problem(rows=8, seed=seed)
        pending.add(Reads(indices, weights, grad))
        for t, bag in enumerate(indices.tolist()):
            for b, row in enumerate(bag):
                total[row] += weights[t, b] * grad[t]
        added = pending.reads[-1].nbytes
        assert pending.nbytes <= 2 * 8 * 6 * 8 + added
    rows, gradient = row_gradients(pending.take(), 8)
    torch.testing.assert_close(gradient, total[rows])


def every_row(seed, dtype, rows=11):
    """Reads that touch every row, several times some."""
    indices, weights, _, _, grad = problem(9, 5, rows, 6, dtype, seed)
    indices.view(-1)[:rows] = torch.arange(rows, dtype=torch.int32)
    return Reads(indices, weights, grad)


@kinds(torch.float64, torch.float32)
def test_lazy_adam_of_all_rows_is_adamw(monkeypatch, implementation, dtype):
    monkeypatch.setenv(VARIABLE, implementation)
    values = problem(dtype=dtype)[2]
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    steps = [every_row(seed, dtype) for seed in range(4)]
    gradients = [row_gradients([reads], 11)[1] for reads in steps]
    expected = adamw(values, gradients, foreach=False, **options)
    found, state = values.clone(), LazyAdam.init_state(values)
    for step, reads in enumerate(steps, 1):
        update_rows([reads], found, state, LazyAdam(0.03, (0.8, 0.95), 1e-6, step, 0.1))
    if implementation == "eager":
        assert torch.equal(found, expected)
    assert_near({"values": found}, {"values": expected}, TOLERANCE[dtype] / 10)


@kinds(torch.float64, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("rule", [LazyAdam, RowwiseAdagrad])
def test_only_rows_that_were_read_change(monkeypatch, implementation, rule, dtype):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, weights, values, gate, grad = problem(rows=40, width=19, dtype=dtype)
    reads = [Reads(indices, weights, grad), Reads(indices[:3, :2], weights[:3, :2], gate[:3])]
    found, state = values.clone(), rule.init_state(values)
    exact, exact_state = values.double().clone(), rule.init_state(values.double())
    options = {"learning_rate": 0.1, "eps": 1e-4, "weight_decay": 0.2, "scale": 0.5}
    for step in (1, 2):
        if rule is LazyAdam:
            options |= {"betas": (0.9, 0.99), "step": step}
        update_rows(reads, found, state, rule(**options))
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, "reference")
            doubles = [Reads(r.indices, r.weights.double(), r.grad.double()) for r in reads]
            update_rows(doubles, exact, exact_state, rule(**options))
    touched = torch.zeros(40, dtype=torch.bool)
    touched[indices.long()] = True
    assert torch.equal(found[~touched], values[~touched])
    assert (found[touched] != values[touched]).any(-1).all()
    names = {"values": (found, exact)} | {name: (state[name], exact_state[name]) for name in state}
    for name, (one, other) in names.items():
        assert_near({name: one}, {name: other}, TOLERANCE[dtype])
        assert one.dtype == (
            dtype if name == "values" else torch.promote_types(dtype, torch.float32)
        )


@NATIVE
@pytest.mark.parametrize("row", [-1, 11, 2**31 - 1])
def test_an_index_that_is_no_row(monkeypatch, row):
    monkeypatch.setenv(VARIABLE, "native")
    indices, weights, values, _, grad = problem(dtype=torch.float32)
    indices[3, 2] = row
    with pytest.raises(IndexError, match="not a row of the table of 11 rows"):
        weighted_bag(indices, weights, values)
    with pytest.raises(IndexError, match="not a row of the table of 11 rows"):
        row_gradients([Reads(indices, weights, grad)], 11)


@NATIVE
@pytest.mark.parametrize("rows", [1, 2048, 2049, 2**22 + 1])
def test_sorting_takes_as_many_passes_as_rows_need(monkeypatch, rows):
    monkeypatch.setenv(VARIABLE, "native")
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, rows, (500, 9), generator=generator, dtype=torch.int32)
    indices[0, 0], indices[-1, -1] = rows - 1, 0
    weights, grad = torch.rand(500, 9, generator=generator), torch.ones(500, 3)
    found, gradient = row_gradients([Reads(indices, weights, grad)], rows)
    expected = torch.zeros(rows).index_add_(0, indices.flatten().long(), weights.flatten())
    assert torch.equal(found, indices.flatten().unique().long())
    torch.testing.assert_close(gradient, expected[found, None].expand(-1, 3))


@NATIVE
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(monkeypatch, threads):
    monkeypatch.setenv(VARIABLE, "native")
    indices, weights, values, _, dout = problem(700, 16, 300, 72, torch.float32)
    given = indices, weights, values, None, dout  # the gate's gradient is torch's
    before = torch.get_num_threads()
    expected = outcome(weighted_bag, *given)
    try:
        torch.set_num_threads(threads)
        found = outcome(weighted_bag, *given)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@kinds(torch.float32)
def test_a_table_without_rows(monkeypatch, implementation, dtype):
    monkeypatch.setenv(VARIABLE, implementation)
    indices, weights, values, gate, dout = problem(0, 3, 1, 6, dtype)
    found = outcome(weighted_bag, indices, weights, values[:0], gate, dout)
    assert found["out"].shape == (0, 6) and found["values"].shape == (0, 6)
    rows, gradient = row_gradients([Reads(indices, weights, dout)], 0)
    assert rows.shape == (0,) and gradient.shape == (0, 6)


def test_no_reads_change_nothing():
    values = torch.randn(4, 3)
    before, state = values.clone(), LazyAdam.init_state(values)
    update_rows([], values, state, LazyAdam(0.1, (0.9, 0.99), 1e-8, 1))
    assert torch.equal(values, before) and not state["exp_avg"].any()


def test_shapes_that_do_not_fit():
    indices, weights, values, gate, _ = problem()
    with pytest.raises(UserError, match=r"indices \[9, 5\] and weights \[9, 4\]"):
        weighted_bag(indices, weights[:, :4], values)
    with pytest.raises(UserError, match=r"gate is \[9, 5\], it must be \[9, 6\]"):
        weighted_bag(indices, weights, values, gate[:, :5])
    with pytest.raises(UserError, match="gathered_dot: indices"):
        gathered_dot(indices, gate[:, :5], values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, g, s: (v.t().contiguous().t(), g, s), r"values \[7, 6\] must be contiguous"),
        (lambda v, g, s: (v, g[:, :5], s), "the reads have 5 channels, the table 6"),
        (lambda v, g, s: (v, g, s | {"exp_avg": s["exp_avg"].double()}), "in torch.float64, for"),
        (
            lambda v, g, s: (v, g, s | {"exp_avg_sq": s["exp_avg_sq"][:4]}),
            r"exp_avg_sq is \[4, 6\]",
        ),
    ],
)
def test_updates_refuse_memory_that_does_not_fit(change, message):
    indices = torch.tensor([[0, 6], [1, 1]])
    values, grad = torch.randn(7, 6), torch.randn(2, 6)
    values, grad, state = change(values, grad, LazyAdam.init_state(values))
    before = values.clone()
    with pytest.raises(UserError, match=message):
        reads = [Reads(indices, torch.ones(2, 2), grad)]
        update_rows(reads, values, state, LazyAdam(0.1, (0.9, 0.99), 1e-8, 1))
    assert torch.equal(values, before)
