"""The short convolution: every implementation against the float64 formula, and its laws."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from memlm.cuda import short_convolution
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.short_convolution import eager, operator
from tests.cuda.harness import (
    TOLERANCE,
    assert_deterministic,
    assert_near,
    poisoned,
    scattered,
)

FLOAT64 = torch.float64
SPLIT = ((2, 3, True), (2, 3, True), (3, 4, False))  # 24 channels
LENGTHS = [3, 0, 1, 17, 0, 2, 2, 40, 0]


def make(lengths, W=4, D=24, packed=False, dtype=FLOAT64, seed=0):
    """Random inputs and boundaries; `lengths` packed in one row, or equal in a batch."""
    generator = torch.Generator().manual_seed(seed)
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    shapes = {"x": (B, T, D), "weight": (D, 1, W), "tail": (len(lengths), W - 1, D)}
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)
        for name, shape in shapes.items()
    }
    return inputs, torch.tensor([0, *lengths]).cumsum(0) if packed else None


def run(monkeypatch, implementation, inputs, **arguments):
    """Outputs, new tail, and gradients of a fixed random function of them all."""
    monkeypatch.setenv(VARIABLE, implementation)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, new_tail = short_convolution(**leaves, **arguments)
    parts = y if isinstance(y, tuple) else (y,)
    results = {f"y{i}": part for i, part in enumerate(parts)} | {"new_tail": new_tail}
    generator = torch.Generator().manual_seed(1)
    # Without tokens the formula knows no weight: this term gives every leaf a gradient.
    loss = sum(0 * x.sum() for x in leaves.values())
    for x in results.values():
        direction = torch.randn(x.shape, generator=generator, dtype=FLOAT64)
        loss = loss + (x * direction.to(x.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    results |= {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def check(monkeypatch, implementation, inputs, tolerance=None, **arguments):
    """Compare with the reference in float64, on the same (rounded) values."""
    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(monkeypatch, "reference", exact, **arguments)
    with poisoned():
        found = run(monkeypatch, implementation, inputs, **arguments)
    assert all(found[f"d{name}"].dtype == x.dtype for name, x in inputs.items())
    assert_near(found, expected, tolerance or TOLERANCE[inputs["x"].dtype])


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", ["silu", None])
def test_the_reference_is_conv1d(monkeypatch, W, activation):
    monkeypatch.setenv(VARIABLE, "reference")
    inputs, _ = make([9, 9], W)
    y, new_tail = short_convolution(**inputs, activation=activation)
    seen = torch.cat((inputs["tail"], inputs["x"]), 1)
    expected = F.conv1d(seen.mT, inputs["weight"], groups=24).mT
    torch.testing.assert_close(y, F.silu(expected) if activation else expected)
    assert torch.equal(new_tail, seen[:, 9:])


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("split", [None, SPLIT])
@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 37])
def test_eager_in_batches(monkeypatch, T, W, split, activation):
    inputs, _ = make([T, T], W)
    check(monkeypatch, "eager", inputs, split=split, activation=activation)


@pytest.mark.parametrize("split", [None, SPLIT])
@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1, 1, 1], [0, 0], [2, 1], []])
def test_eager_in_packed_rows(monkeypatch, lengths, W, split):
    inputs, boundaries = make(lengths, W, packed=True)
    check(monkeypatch, "eager", inputs, split=split, cu_seqlens=boundaries)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("W", [2, 4])
def test_eager_in_several_blocks(monkeypatch, W, packed):
    monkeypatch.setattr(eager, "BLOCK_CPU", 1)  # as few as it takes
    lengths = [70, 0, 15, 17, 31] if packed else [130, 130]
    inputs, boundaries = make(lengths, W, packed=packed)
    check(monkeypatch, "eager", inputs, split=SPLIT, cu_seqlens=boundaries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split", [None, SPLIT])
@pytest.mark.parametrize("activation", ["silu", None])
def test_eager_in_low_precision(monkeypatch, dtype, split, activation):
    inputs, boundaries = make(LENGTHS, packed=True, dtype=dtype)
    check(monkeypatch, "eager", inputs, split=split, cu_seqlens=boundaries, activation=activation)


def test_float32_weights_of_low_precision_inputs(monkeypatch):
    inputs, _ = make([20], dtype=torch.bfloat16)
    inputs["weight"] = inputs["weight"].float() + 1e-3
    check(monkeypatch, "eager", inputs, TOLERANCE[torch.bfloat16], split=SPLIT)


# The interpreter takes about a second per program of the backward kernel.
SLOW = pytest.mark.slow  # in Triton's interpreter
TRITON_CASES = {
    "packed": ([3, 0, 70, 2, 1, 0], True, 4, SPLIT, "silu", FLOAT64),
    "two slots": ([66], False, 4, None, None, torch.float32),
    "one token": ([1, 1], False, 4, SPLIT, "silu", torch.float16),
    "shorter than the tail": ([5, 5], False, 8, ((2, 12, True),), "silu", torch.float32),
    "no neighbours": ([3], False, 1, None, "silu", FLOAT64),
    "two parts": ([6], False, 3, ((2, 10, False), (1, 4, True)), "silu", torch.float32),
    "no token": ([0, 0], True, 4, SPLIT, "silu", torch.float32),
}


@pytest.mark.parametrize("case", [pytest.param("packed", marks=SLOW), *list(TRITON_CASES)[1:]])
def test_triton(monkeypatch, case):
    pytest.importorskip("triton")
    lengths, packed, W, split, activation, dtype = TRITON_CASES[case]
    inputs, boundaries = make(lengths, W, packed=packed, dtype=dtype)
    check(monkeypatch, "triton", inputs, split=split, activation=activation, cu_seqlens=boundaries)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_views_of_a_wider_projection(monkeypatch, implementation):
    rows = 2 if implementation == "eager" else 1
    inputs, _ = make([5] * rows, dtype=torch.float32)
    wide = torch.full((rows, 5, 40), torch.nan)
    wide[..., 8:32] = inputs["x"]
    check(monkeypatch, implementation, inputs | {"x": wide[..., 8:32]}, split=SPLIT)
    views = {name: scattered(x) for name, x in inputs.items()}
    check(monkeypatch, implementation, views, split=SPLIT)


@pytest.mark.parametrize("implementation", ["reference", "eager", "triton"])
def test_parts_are_contiguous_and_the_new_tail_owns_its_memory(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    inputs, _ = make([5, 5])
    parts, new_tail = short_convolution(**inputs, split=SPLIT)
    assert [tuple(part.shape) for part in parts] == [(2, 5, *part[:2]) for part in SPLIT]
    assert all(part.is_contiguous() for part in parts)
    assert new_tail.untyped_storage().nbytes() == new_tail.nbytes
    norms = parts[0].square().sum(-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=0)


@pytest.mark.parametrize("lengths", [(1, 5, 1, 1, 0, 29), (2, 35), (36, 1)])
def test_many_calls_are_one(lengths):
    inputs, _ = make([37])
    whole, last = short_convolution(**inputs, split=SPLIT)
    tail, start, pieces = inputs["tail"], 0, []
    for length in lengths:
        x = inputs["x"][:, start : start + length]
        parts, tail = short_convolution(x, inputs["weight"], tail, split=SPLIT)
        pieces.append(parts)
        start += length
    for part, found in zip(whole, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(found, 1), part)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("split", [None, SPLIT])
def test_no_grad_changes_no_bit(monkeypatch, split):
    inputs, boundaries = make(LENGTHS, packed=True)
    expected = run(monkeypatch, "eager", inputs, split=split, cu_seqlens=boundaries)
    with torch.no_grad():
        y, new_tail = short_convolution(**inputs, split=split, cu_seqlens=boundaries)
    for i, part in enumerate(y if split else (y,)):
        assert torch.equal(part, expected[f"y{i}"])
    assert torch.equal(new_tail, expected["new_tail"])


def test_packed_equals_one_by_one():
    inputs, boundaries = make(LENGTHS, packed=True)
    together, tails = short_convolution(**inputs, cu_seqlens=boundaries)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        x, tail = inputs["x"][:, start:end], inputs["tail"][i : i + 1]
        alone, last = short_convolution(x, inputs["weight"], tail)
        torch.testing.assert_close(together[:, start:end], alone)
        assert torch.equal(tails[i : i + 1], last)


def test_no_tail_is_a_tail_of_zeros():
    inputs, boundaries = make(LENGTHS, packed=True)
    x, weight, tail = inputs.values()
    for cu_seqlens, zeros in (
        (boundaries, torch.zeros_like(tail)),
        (None, torch.zeros_like(tail[:1])),
    ):
        expected, _ = short_convolution(x, weight, zeros, cu_seqlens)
        assert torch.equal(short_convolution(x, weight, None, cu_seqlens)[0], expected)


@pytest.mark.parametrize("unused", ["y0", "y1", "new_tail"])
@pytest.mark.parametrize("compiled", [False, True])
def test_unused_outputs_send_no_gradient(monkeypatch, unused, compiled):
    monkeypatch.setenv(VARIABLE, "eager")
    inputs, _ = make([5, 5])
    leaves = [x.requires_grad_() for x in inputs.values()]
    function = torch.compile(short_convolution, fullgraph=True, backend="aot_eager", dynamic=True)
    found = {}
    for name in ("reference", "eager"):
        monkeypatch.setenv(VARIABLE, name)
        call = function if compiled and name == "eager" else short_convolution
        parts, new_tail = call(*leaves, split=SPLIT)
        outputs = {"y0": parts[0], "y1": parts[1], "y2": parts[2], "new_tail": new_tail}
        outputs.pop(unused)
        loss = sum(x.sin().sum() for x in outputs.values())
        gradients = torch.autograd.grad(loss, leaves)
        found[name] = dict(zip(inputs, gradients, strict=True))
    assert_near(found["eager"], found["reference"], TOLERANCE[FLOAT64])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("triton", marks=SLOW)])
def test_the_custom_op(implementation, packed):
    inputs, boundaries = make([3, 0, 4] if packed else [2, 2], packed=packed)
    leaves = [x.requires_grad_() for x in inputs.values()]
    columns = [list(column) for column in zip(*SPLIT, strict=True)]
    torch.library.opcheck(operator._forward, (*leaves, boundaries, True, *columns, implementation))
    values = [leaf.detach() for leaf in leaves]
    with torch.no_grad():
        parts, tail = operator._forward(*values, boundaries, True, *columns, implementation)
    torch.library.opcheck(
        operator._backward, (*values, boundaries, True, *columns, parts, tail, implementation)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", [None, SPLIT])
def test_compiled_in_one_graph(monkeypatch, packed, split):
    inputs, boundaries = make(LENGTHS if packed else [9, 9], packed=packed)
    plain = run(monkeypatch, "eager", inputs, split=split, cu_seqlens=boundaries)
    function = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "short_convolution", function)
    compiled = run(monkeypatch, "eager", inputs, split=split, cu_seqlens=boundaries)
    assert_near(compiled, plain, 0.0)


@pytest.mark.parametrize("implementation", ["eager", pytest.param("triton", marks=SLOW)])
def test_two_runs_give_the_same_bits(monkeypatch, implementation):
    inputs, boundaries = make([3, 0, 9, 2], packed=True, dtype=torch.float32)
    assert_deterministic(
        lambda: run(monkeypatch, implementation, inputs, split=SPLIT, cu_seqlens=boundaries)
    )


@pytest.mark.parametrize(
    ("implementation", "T"),
    [("eager", 1), ("eager", 9), pytest.param("triton", 1, marks=SLOW), ("triton", 9)],
)
def test_a_row_does_not_depend_on_its_batch(monkeypatch, implementation, T):
    inputs, _ = make([T] * 2, dtype=torch.float32)
    together = run(monkeypatch, implementation, inputs, split=SPLIT)
    row = {name: x[1:2] if name != "weight" else x for name, x in inputs.items()}
    monkeypatch.setenv(VARIABLE, implementation)
    parts, new_tail = short_convolution(**row, split=SPLIT)
    for i, part in enumerate(parts):
        assert torch.equal(part, together[f"y{i}"][1:2])
    assert torch.equal(new_tail, together["new_tail"][1:2])


def test_sequences_do_not_mix(monkeypatch):
    inputs, boundaries = make([3, 5, 2], packed=True)
    clean = run(monkeypatch, "eager", inputs, split=SPLIT, cu_seqlens=boundaries)
    inputs["x"][:, 3:8] = torch.nan
    inputs["tail"][1] = torch.nan
    dirty = run(monkeypatch, "eager", inputs, split=SPLIT, cu_seqlens=boundaries)
    for name in ("y0", "y1", "y2", "dx"):
        for kept in (slice(0, 3), slice(8, 10)):
            assert torch.equal(dirty[name][:, kept], clean[name][:, kept]), name
    for name in ("new_tail", "dtail"):
        assert torch.equal(dirty[name][[0, 2]], clean[name][[0, 2]]), name


def test_autocast_changes_nothing(monkeypatch):
    inputs, _ = make([9], dtype=torch.float32)
    plain = run(monkeypatch, "eager", inputs, split=SPLIT)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(monkeypatch, "eager", inputs, split=SPLIT)
    assert_near(inside, plain, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 24)}, "x is .* expected floating point"),
        ({"x": torch.zeros(1, 3, 24, dtype=torch.int64)}, "x is .* expected floating point"),
        ({"weight": torch.zeros(24, 4)}, "weight is"),
        ({"weight": torch.zeros(23, 1, 4)}, "weight is"),
        ({"tail": torch.zeros(2, 3, 24)}, "tail is"),
        ({"tail": torch.zeros(1, 4, 24)}, "tail is"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"split": ((2, 3, True),)}, "split covers 6 channels, x has 24"),
        ({"split": ((2, 12, True), (0, 4, False))}, "must be at least 1"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "ends with 2"),
        ({"x": torch.zeros(2, 3, 24), "cu_seqlens": torch.tensor([0, 3])}, "one row"),
    ],
)
def test_shapes_are_checked(change, message):
    inputs, _ = make([3])
    with pytest.raises(ValueError, match=message):
        short_convolution(**inputs | change)


@pytest.mark.parametrize(
    "W, split, dtype, reason",
    [
        (9, None, torch.float32, "9 wide, the kernels take up to 8"),
        (4, ((1, 6, False),) * 4, torch.float32, "4 parts"),
        (4, ((1, 1025, True),), torch.float32, "1025 channels"),
    ],
)
def test_what_the_kernels_refuse(monkeypatch, W, split, dtype, reason):
    pytest.importorskip("triton")
    D = sum(heads * size for heads, size, _ in split) if split else 24
    inputs, _ = make([2], W, D, dtype=dtype)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=reason):
        short_convolution(**inputs, split=split)
    check(monkeypatch, "eager", inputs, split=split)
