"""The Triton kernels in their interpreter, against the float64 reference."""

from unittest import mock

import pytest
import torch

from memlm.cuda.dispatch import compiling_for
from tests.cuda.harness import (
    TOLERANCE,
    assert_deterministic,
    assert_near,
    poisoned,
    scattered,
)
from tests.cuda.recurrence_cases import Case, call, results

triton = pytest.importorskip("triton")

EVERYTHING = ("qk_l2norm", "beta_sigmoid", "allow_neg_eigval")
CASES = [
    Case((65,), (1, 1, 16, 16), decay="none"),
    Case((65,), (1, 1, 16, 16), decay="const"),
    Case((65,), (1, 1, 16, 16), decay="scalar", initial_state=False),
    Case((65,), (2, 4, 24, 20), decay="gated", options=EVERYTHING),
    Case((70,), (1, 3, 24, 40), decay="gated", options=EVERYTHING[:2]),
    Case((70,), (1, 1, 16, 16), options=("allow_neg_eigval",)),
    Case((70,), (1, 1, 100, 80), decay="scalar", options=("qk_l2norm",)),
    Case((33,), (1, 1, 130, 20)),
    Case((1,), (1, 2, 16, 16)),
    Case((64, 64), (1, 1, 16, 16)),
    Case((5, 0, 70, 1, 0), (1, 2, 20, 24), packed=True, decay="gated", options=EVERYTHING),
    Case((64, 128), (1, 1, 16, 16), packed=True, initial_state=False),
    Case((0, 0), (1, 1, 16, 16), packed=True),
    Case((70,), (1, 2, 24, 40), delta=False, decay="none"),
    Case((70,), (1, 1, 24, 16), delta=False, decay="const"),
    Case((70, 3), (2, 2, 16, 24), delta=False, packed=True, options=("qk_l2norm",)),
    Case((130,), (1, 1, 16, 16), strength=16.0),
]
HALVES = [
    Case((70,), (1, 1, 24, 40), decay="gated", options=EVERYTHING[:2]),
    CASES[7],
    CASES[14],
]


def assert_kernels_near(case, dtype=torch.float32, tolerance=TOLERANCE[torch.float32]):
    tensors = {name: x.to(dtype) if name in "qkv" else x.float() for name, x in case.make().items()}
    wide = {name: x.double() for name, x in tensors.items()}
    expected = results("reference", wide, **case.settings())
    with poisoned():
        found = results("triton", tensors, **case.settings())
    if case.strength > 8:
        # What passes through such decays is below the kernels' zero, e^-60.
        found["dinitial_state"], expected["dinitial_state"] = torch.zeros(2, 1)
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case):
    assert_kernels_near(case, tolerance=3e-5)


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_half_precision(case):
    assert_kernels_near(case, torch.float16, TOLERANCE[torch.float16])


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[3], CASES[10]], ids=str)
def test_the_shorter_chunks_of_older_cards(case):
    with compiling_for(80):
        assert_kernels_near(case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((300, 300), (1, 2, 16, 20)), marks=pytest.mark.slow),
        Case((260,), (1, 1, 16, 16), delta=False, initial_state=False),
        Case((5, 0, 200, 70), (1, 1, 16, 16), packed=True, decay="gated", options=EVERYTHING),
        Case((260, 1), (1, 1, 16, 16), packed=True, initial_state=False),
    ],
    ids=str,
)
def test_split_sequences_are_exact(case):
    with mock.patch("memlm.cuda.linear_recurrence.triton_implementation.segments", lambda _: 3):
        assert_kernels_near(case)


def test_duplicate_keys_and_extreme_write_strengths():
    case = Case((130,), (1, 1, 16, 16))
    tensors = {name: x.float() for name, x in case.make().items()}
    tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"]).contiguous()
    tensors["beta"][:, ::3] = 0.0
    tensors["beta"][:, 1::3] = 2.0
    wide = {name: x.double() for name, x in tensors.items()}
    assert_near(results("triton", tensors), results("reference", wide), 3e-5)


def test_a_decay_of_minus_infinity_stays_finite_and_forgets():
    tensors = {name: x.float() for name, x in Case((70,), (1, 1, 16, 16)).make().items()}
    tensors["log_decay"][:, 40] = -torch.inf
    found = results("triton", tensors)
    assert all(x.isfinite().all() for x in found.values())
    rest = {name: x[:, 40:] for name, x in tensors.items() if name != "initial_state"}
    torch.testing.assert_close(found["o"][:, 40:], call("triton", rest)[0], rtol=1e-5, atol=1e-5)


def test_two_segments_with_the_gradient_through_the_state():
    case = Case((100,), (1, 2, 16, 20), decay="gated", options=EVERYTHING)
    tensors = {name: x.float() for name, x in case.make().items()}

    def halves(implementation, tensors):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        tokens = [name for name in leaves if leaves[name].ndim > 1 and name != "initial_state"]
        first = leaves | {name: leaves[name][:, :37] for name in tokens}
        second = leaves | {name: leaves[name][:, 37:] for name in tokens}
        o, state = call(implementation, first, return_state=True, **case.settings())
        second["initial_state"] = state
        o2, last = call(implementation, second, return_state=True, **case.settings())
        loss = sum(x.square().sum() for x in (o, o2, last))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    wide = {name: x.double() for name, x in tensors.items()}
    assert_near(halves("triton", tensors), halves("reference", wide), 3e-5)


@pytest.mark.slow
def test_views_are_read_as_they_lie():
    case = Case((66,), (1, 2, 16, 16), decay="gated")
    tensors = {name: x.float() for name, x in case.make().items()}
    spread = {name: scattered(x) for name, x in tensors.items()}
    # A projection's parts, as the kernels read them: tokens apart, heads side by side.
    q, k, v = tensors["q"].flatten(2), tensors["k"].flatten(2), tensors["v"].flatten(2)
    parts = torch.cat((q, k, v), -1).split((16, 16, 32), -1)
    packed = dict(zip("qkv", (x.unflatten(-1, (-1, 16)) for x in parts), strict=True))
    expected = results("triton", tensors)
    for views in (spread, tensors | packed):
        found = results("triton", views)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_single_tokens_are_read_as_they_lie():
    case = Case((1, 1, 1), (1, 2, 16, 16), decay="gated")
    tensors = {name: x.float() for name, x in case.make().items()}
    # Rows of one sequence turned into a batch: the stride of their only token means nothing.
    turned = {
        name: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x
        for name, x in tensors.items()
    }
    expected = results("triton", tensors)
    alone = call("triton", tensors, return_state=True)
    for views in (turned, {name: scattered(x) for name, x in tensors.items()}):
        found = results("triton", views)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        for one, other in zip(call("triton", views, return_state=True), alone, strict=True):
            assert torch.equal(one, other)


def test_a_gate_that_diverged_shows():
    tensors = {name: x.float() for name, x in Case((70,), (1, 1, 16, 16)).make().items()}
    tensors["log_decay"][:, 40] = torch.nan
    o = call("triton", tensors)[0]
    assert o[:, 40:].isnan().all()


@pytest.mark.slow
def test_runs_and_rows_are_bit_equal():
    case = Case((70, 70), (1, 2, 16, 16), decay="scalar")
    tensors = {name: x.float() for name, x in case.make().items()}
    assert_deterministic(lambda: results("triton", tensors))
    both = call("triton", tensors, return_state=True)
    alone = call("triton", {name: x[1:] for name, x in tensors.items()}, return_state=True)
    for together, single in zip(both, alone, strict=True):
        assert torch.equal(together[1:], single)


def test_chunk_states():
    case = Case((5, 0, 200), (1, 1, 16, 16), packed=True)
    tensors = {name: x.float() for name, x in case.make().items()}
    wide = {name: x.double() for name, x in tensors.items()}
    for target in (80, 90):
        with compiling_for(target), torch.no_grad(), poisoned():
            found = call("triton", tensors, return_chunk_states=True, **case.settings())[2]
        expected = call("reference", wide, return_chunk_states=True, **case.settings())[2]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_operator_checks():
    from memlm.cuda.linear_recurrence import operator
    from tests.cuda.test_linear_recurrence_operator import arguments

    case = Case((5,), (1, 2, 16, 16), decay="gated", options=EVERYTHING)
    torch.library.opcheck(
        operator._forward, (*arguments(case, torch.float32), True, True, "triton")
    )


def test_sizes_beyond_the_kernels_are_refused_by_name():
    tensors = Case((2,), (1, 1, 257, 3)).make(torch.float32)
    with pytest.raises(RuntimeError, match="K = 257, V = 3: the kernels take up to 256"):
        call("triton", tensors)


def test_off_a_gpu_the_reason_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    tensors = Case((2,), (1, 1, 16, 16)).make(torch.bfloat16)
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        call("triton", tensors)
    with pytest.raises(RuntimeError, match="float32 values are left to eager"):
        call("triton", Case((2,), (1, 1, 16, 16)).make(torch.float32))
