"""The diagonal scan: every implementation against the float64 formula, and its laws."""

import itertools

import pytest
import torch

from memlm.cuda import diagonal_scan
from memlm.cuda.diagonal_scan import eager, operator
from memlm.cuda.dispatch import VARIABLE
from tests.cuda.harness import (
    TOLERANCE,
    assert_deterministic,
    assert_near,
    poisoned,
    scattered,
)

FLOAT64 = torch.float64
LENGTHS = [3, 0, 1, 17, 0, 2, 2, 140, 0]


def make(lengths, D=5, packed=False, dtype=FLOAT64, seed=0):
    """Random inputs and boundaries; `lengths` packed in one row, or equal in a batch.

    Coefficients lie in [-1, 1]; a tenth of them is zero, a tenth one.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    uniform = torch.rand(2, B, T, D, generator=generator, dtype=FLOAT64)
    a = torch.where(uniform[1] < 0.1, 0, 2 * uniform[0] - 1).masked_fill(uniform[1] > 0.9, 1)
    b = torch.randn(B, T, D, generator=generator, dtype=FLOAT64)
    state = torch.randn(len(lengths), D, generator=generator, dtype=FLOAT64)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {"a": a.to(dtype), "b": b.to(dtype), "initial_state": state.to(wide)}
    return inputs, torch.tensor([0, *lengths]).cumsum(0) if packed else None


def run(monkeypatch, implementation, inputs, cu_seqlens=None, function=diagonal_scan):
    """Outputs, final states, and gradients of a fixed random function of both."""
    monkeypatch.setenv(VARIABLE, implementation)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    h, state = function(**leaves, cu_seqlens=cu_seqlens, return_state=True)
    results = {"h": h, "state": state}
    generator = torch.Generator().manual_seed(1)
    # Without tokens the formula knows no a: this term gives every leaf a gradient.
    loss = sum(0 * x.sum() for x in leaves.values())
    for x in results.values():
        direction = torch.randn(x.shape, generator=generator, dtype=FLOAT64)
        loss = loss + (x * direction.to(x.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    results |= {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def check(monkeypatch, implementation, inputs, cu_seqlens=None, tolerance=None):
    """Compare with the reference in float64, on the same (rounded) values."""
    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(monkeypatch, "reference", exact, cu_seqlens)
    with poisoned():
        found = run(monkeypatch, implementation, inputs, cu_seqlens)
    assert all(found[f"d{name}"].dtype == x.dtype for name, x in inputs.items())
    assert found["h"].dtype == inputs["b"].dtype
    assert_near(found, expected, tolerance or TOLERANCE[inputs["b"].dtype])


def test_the_reference_is_the_formula(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    a, b = torch.tensor([[[0.5, -1.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    h, state = diagonal_scan(a, b, torch.tensor([[10.0, 20.0]]), return_state=True)
    assert h.tolist() == [[[6.0, -18.0], [3.0, -32.0]]]
    assert state.tolist() == [[3.0, -32.0]]


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 200])
def test_eager_in_batches(monkeypatch, T):
    check(monkeypatch, "eager", make([T, T])[0])


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [5], [1] * 40, [0, 0], [64, 64], [0, 1, 200, 63, 65, 0], []]
)
def test_eager_in_packed_rows(monkeypatch, lengths):
    check(monkeypatch, "eager", *make(lengths, packed=True))


@pytest.mark.parametrize("packed", [False, True])
def test_eager_in_several_segments(monkeypatch, packed):
    monkeypatch.setattr(eager, "STEP_CPU", 1)
    monkeypatch.setattr(eager, "MIN_CHUNKS", 3)
    lengths = [70, 0, 115, 17, 131] if packed else [230, 230]
    inputs, boundaries = make(lengths, packed=packed)
    assert len(eager._segments(230, 10, torch.device("cpu"))) > 3
    check(monkeypatch, "eager", inputs, boundaries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_eager_in_low_precision(monkeypatch, dtype, packed):
    check(monkeypatch, "eager", *make(LENGTHS if packed else [90, 90], packed=packed, dtype=dtype))


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_float32_coefficients_of_bfloat16_inputs(monkeypatch, implementation):
    inputs, _ = make([20], dtype=torch.bfloat16)
    inputs["a"] = 1 - 1e-3 * inputs["a"].float()  # bfloat16 would round it to one
    check(monkeypatch, implementation, inputs)


def test_long_sequences_are_stable(monkeypatch):
    """65536 tokens of slow decays, against recursive doubling in float64."""
    T, D = 65536, 4
    generator = torch.Generator().manual_seed(0)
    distance = 10 ** (-5 * torch.rand(1, T, D, generator=generator, dtype=FLOAT64))
    inputs = {
        "a": (1 - distance).float(),
        "b": torch.randn(1, T, D, generator=generator),
        "initial_state": torch.randn(1, D, generator=generator),
    }
    exact = {name: x.double() for name, x in inputs.items()}
    a, h = exact["a"].clone(), exact["b"].clone()
    h[:, 0] += a[:, 0] * exact["initial_state"]
    shift = 1
    while shift < T:
        h[:, shift:] += a[:, shift:] * h[:, :-shift]
        a[:, shift:] *= a[:, :-shift].clone()
        shift *= 2
    found = run(monkeypatch, "eager", inputs)
    assert_near({"h": found["h"]}, {"h": h}, 1e-5)
    assert_near(found, run(monkeypatch, "eager", exact), 1e-5)


@pytest.mark.filterwarnings("ignore:.* encountered in multiply")  # the interpreter's
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_coefficients_beyond_one(monkeypatch, implementation):
    """The product of a chunk or a slot overflows, h does not: it is still zero there."""
    T, slot = (260, None) if implementation == "eager" else (68, 32)
    inputs, _ = make([T], D=3, dtype=torch.float32)
    inputs["a"][:, : T - 28], inputs["a"][:, T - 28 : T - 8] = 1e20, 3.0
    inputs["a"][:, T - 8 :] = -0.5
    inputs["b"][:, : T - 28] = 0.0
    inputs["initial_state"][:] = 0.0
    if implementation == "triton":
        triton_kernels = pytest.importorskip("memlm.cuda.diagonal_scan.triton_kernels")
        monkeypatch.setattr(triton_kernels, "SLOT", slot)
        assert triton_kernels.slot_size(operator.Inputs(**inputs, cu_seqlens=None)) == slot
    monkeypatch.setenv(VARIABLE, implementation)
    h, state = diagonal_scan(**inputs, return_state=True)
    exact = {name: x.double() for name, x in inputs.items()}
    monkeypatch.setenv(VARIABLE, "reference")
    expected = diagonal_scan(**exact, return_state=True)
    assert_near({"h": h, "state": state}, dict(zip(("h", "state"), expected, strict=True)), 1e-5)


# The interpreter takes some hundredths of a second per token of a program.
TRITON_CASES = {
    "packed": ([3, 0, 40, 2, 1, 0], 5, True, FLOAT64),
    "blocks of channels": ([9, 9], 70, False, torch.float32),
    "one token": ([1, 1], 5, False, torch.float16),
    "no token": ([0, 0], 5, True, torch.float32),
    "bfloat16": ([9, 9], 5, False, torch.bfloat16),
    "a block of tokens": ([8], 64, False, torch.float32),
}


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton(monkeypatch, case):
    pytest.importorskip("triton")
    lengths, D, packed, dtype = TRITON_CASES[case]
    check(monkeypatch, "triton", *make(lengths, D, packed, dtype))


@pytest.mark.parametrize("lengths", [[40], [0, 17, 0, 16, 32, 2, 0], [0, 0, 33]])
def test_triton_in_slots(monkeypatch, lengths):
    triton_kernels = pytest.importorskip("memlm.cuda.diagonal_scan.triton_kernels")
    monkeypatch.setattr(triton_kernels, "SLOT", 16)
    inputs, boundaries = make(lengths, packed=len(lengths) > 1, dtype=torch.float32)
    given = operator.Inputs(**inputs, cu_seqlens=boundaries)
    assert triton_kernels.slot_size(given) == 16
    check(monkeypatch, "triton", inputs, boundaries)
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    assert triton_kernels.slot_size(given) == sum(lengths) + 1


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_views(monkeypatch, implementation):
    inputs, _ = make([9, 9], dtype=torch.float32)
    halves = torch.cat((inputs["a"], inputs["b"]), -1).chunk(2, -1)
    expected = run(monkeypatch, implementation, inputs)
    views = {name: scattered(x) for name, x in inputs.items()}
    for given in (views, inputs | dict(zip("ab", halves, strict=True))):
        assert not given["a"].is_contiguous()
        assert_near(run(monkeypatch, implementation, given), expected, 0.0)


@pytest.mark.parametrize("implementation", ["reference", "eager", "triton"])
def test_the_final_state_owns_its_memory(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    for T in (0, 5):
        inputs, _ = make([T, T])
        h, state = diagonal_scan(**inputs, return_state=True)
        assert h.is_contiguous() and state.is_contiguous()
        if implementation != "reference" or T:
            assert state.untyped_storage().nbytes() == state.nbytes
            assert state.data_ptr() != inputs["initial_state"].data_ptr()
    assert diagonal_scan(**inputs)[1] is None


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_two_segments_with_the_gradient_through_the_state(monkeypatch, implementation):
    inputs, _ = make([37, 37], dtype=torch.float32)

    def halves(a, b, initial_state, cu_seqlens, return_state):
        first, state = diagonal_scan(a[:, :20], b[:, :20], initial_state, return_state=True)
        second, state = diagonal_scan(a[:, 20:], b[:, 20:], state, return_state=True)
        return torch.cat((first, second), 1), state

    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(monkeypatch, "reference", exact)
    found = run(monkeypatch, implementation, inputs, function=halves)
    assert_near(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("lengths", [(1, 5, 1, 1, 0, 29), (2, 35), (1,) * 37])
def test_many_calls_are_one(lengths):
    inputs, _ = make([37])
    whole, last = diagonal_scan(**inputs, return_state=True)
    state, start, pieces = inputs["initial_state"], 0, []
    for length in lengths:
        a, b = (inputs[name][:, start : start + length] for name in "ab")
        h, state = diagonal_scan(a, b, state, return_state=True)
        pieces.append(h)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


def test_packed_equals_one_by_one():
    inputs, boundaries = make(LENGTHS, packed=True)
    together, states = diagonal_scan(**inputs, cu_seqlens=boundaries, return_state=True)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        a, b = (inputs[name][:, start:end] for name in "ab")
        alone, state = diagonal_scan(a, b, inputs["initial_state"][i : i + 1], return_state=True)
        torch.testing.assert_close(together[:, start:end], alone)
        torch.testing.assert_close(states[i : i + 1], state)


@pytest.mark.parametrize("packed", [False, True])
def test_no_state_is_a_state_of_zeros(packed):
    inputs, boundaries = make([4, 4], packed=packed, dtype=torch.bfloat16)
    zeros = torch.zeros_like(inputs.pop("initial_state"))
    h, state = diagonal_scan(**inputs, cu_seqlens=boundaries, return_state=True)
    expected, last = diagonal_scan(**inputs, initial_state=zeros, cu_seqlens=boundaries,
                                   return_state=True)  # fmt: skip
    assert torch.equal(h, expected) and torch.equal(state, last)
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_sequences_do_not_mix(monkeypatch, implementation):
    if implementation == "triton":
        triton_kernels = pytest.importorskip("memlm.cuda.diagonal_scan.triton_kernels")
        monkeypatch.setattr(triton_kernels, "SLOT", 16)
    inputs, boundaries = make([3, 17, 8], packed=True)
    clean = run(monkeypatch, implementation, inputs, boundaries)
    for name in "ab":
        inputs[name][:, 3:20] = torch.nan
    inputs["initial_state"][1] = torch.nan
    dirty = run(monkeypatch, implementation, inputs, boundaries)
    for name in ("h", "da", "db"):
        for kept in (slice(0, 3), slice(20, 28)):
            assert torch.equal(dirty[name][:, kept], clean[name][:, kept]), name
    for name in ("state", "dinitial_state"):
        assert torch.equal(dirty[name][[0, 2]], clean[name][[0, 2]]), name
    assert dirty["h"][:, 3:20].isnan().all()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_two_runs_give_the_same_bits(monkeypatch, implementation):
    inputs, boundaries = make([3, 0, 9, 2], packed=True, dtype=torch.float32)
    assert_deterministic(lambda: run(monkeypatch, implementation, inputs, boundaries))


@pytest.mark.parametrize("implementation, T", [("eager", 9), ("eager", 700), ("triton", 9)])
def test_a_row_does_not_depend_on_its_batch(monkeypatch, implementation, T):
    monkeypatch.setattr(eager, "STEP_CPU", 400)  # so that the number of rows moves the segments
    inputs, _ = make([T] * (9 if implementation == "eager" else 3), dtype=torch.float32)
    device = torch.device("cpu")
    if T == 700:
        assert eager._segments(T, 5, device) != eager._segments(T, 45, device)
    together = run(monkeypatch, implementation, inputs)
    leaves = [x[1:2].detach().requires_grad_() for x in inputs.values()]
    h, state = diagonal_scan(*leaves, return_state=True)
    assert torch.equal(h, together["h"][1:2]) and torch.equal(state, together["state"][1:2])


@pytest.mark.parametrize(("implementation", "packed"), [("eager", True), ("triton", False)])
def test_the_custom_op(implementation, packed):
    inputs, boundaries = make([3, 0, 4] if packed else [2, 2], packed=packed)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(operator._forward, (*leaves, boundaries, implementation))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_in_one_graph(monkeypatch, packed):
    inputs, boundaries = make(LENGTHS if packed else [90, 90], packed=packed)
    plain = run(monkeypatch, "eager", inputs, boundaries)
    function = torch.compile(diagonal_scan, fullgraph=True, backend="aot_eager")
    compiled = run(monkeypatch, "eager", inputs, boundaries, function)
    assert_near(compiled, plain, 0.0)


@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_unused_outputs_send_no_gradient(monkeypatch, unused, compiled):
    inputs, _ = make([5, 5])
    leaves = [x.requires_grad_() for x in inputs.values()]
    function = torch.compile(diagonal_scan, fullgraph=True, backend="aot_eager")
    found = {}
    for name in ("reference", "eager"):
        monkeypatch.setenv(VARIABLE, name)
        call = function if compiled and name == "eager" else diagonal_scan
        loss = call(*leaves, return_state=True)[1 - unused].sin().sum()
        found[name] = dict(zip(inputs, torch.autograd.grad(loss, leaves), strict=True))
    assert_near(found["eager"], found["reference"], TOLERANCE[FLOAT64])


def test_no_grad_and_autocast_change_no_bit(monkeypatch):
    inputs, boundaries = make(LENGTHS, packed=True, dtype=torch.float32)
    plain = run(monkeypatch, "eager", inputs, boundaries)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(monkeypatch, "eager", inputs, boundaries)
    assert_near(inside, plain, 0.0)
    with torch.no_grad():
        h, state = diagonal_scan(**inputs, cu_seqlens=boundaries, return_state=True)
    assert torch.equal(h, plain["h"]) and torch.equal(state, plain["state"])


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_the_inputs_are_left_as_they_are(monkeypatch, implementation):
    inputs, boundaries = make([3, 0, 9], packed=True)
    before = {name: x.clone() for name, x in inputs.items()}
    run(monkeypatch, implementation, inputs, boundaries)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": torch.zeros(3, 5)}, "b is .* expected floating point"),
        ({"b": torch.zeros(1, 3, 5, dtype=torch.int64)}, "b is .* expected floating point"),
        ({"a": torch.zeros(1, 3, 1)}, "a is .* expected floating point"),
        ({"initial_state": torch.zeros(2, 5)}, "initial_state is"),
        ({"initial_state": torch.zeros(1, 4)}, "initial_state is"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "must rise from 0 to the number of tokens, 3"),
        ({"cu_seqlens": torch.tensor([1, 3])}, "must rise from 0 to the number of tokens, 3"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 1, 3]), "initial_state": torch.zeros(3, 5)},
            "must rise from 0 to the number of tokens, 3",
        ),
        (
            {
                "a": torch.zeros(2, 3, 5),
                "b": torch.zeros(2, 3, 5),
                "cu_seqlens": torch.tensor([0, 3]),
            },
            "one row",
        ),
    ],
)
def test_shapes_are_checked(change, message):
    inputs, _ = make([3])
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**inputs | change)
