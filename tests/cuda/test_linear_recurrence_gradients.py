"""Values and all gradients of the recurrence against the reference in float64."""

import itertools

import pytest
import torch

from tests.cuda.harness import TOLERANCE, assert_near, scattered
from tests.cuda.recurrence_cases import DECAYS, LENGTHS, SIZES, Case, call, results, weighted

OPTIONS = ("qk_l2norm", "beta_sigmoid", "allow_neg_eigval")


def options(number: int, delta: bool) -> tuple[str, ...]:
    """The options whose bit is set, without those that the additive recurrence has not."""
    chosen = [name for bit, name in enumerate(OPTIONS) if number >> bit & 1]
    return tuple(name for name in chosen if delta or name == "qk_l2norm")


def sweep() -> list[Case]:
    """Lengths, decays and rules in all combinations; sizes, options and initial states in turn.

    Every size meets every length, and every decay under both rules.
    """
    cases = []
    lengths = [((T, T), False) for T in (0, 1, 2, 31, 64, 65, 150)]
    lengths += [(packed, True) for packed in LENGTHS]
    combinations = itertools.product(
        enumerate(lengths), enumerate(DECAYS), enumerate((True, False))
    )
    for n, ((i, (length, packed)), (j, decay), (k, delta)) in enumerate(combinations):
        sizes = SIZES[(i + j + 2 * k) % len(SIZES)]
        settings = {"options": options(n // 3, delta), "initial_state": n % 5 > 0}
        cases.append(Case(length, sizes, packed, delta, decay, **settings))
    return cases


@pytest.mark.parametrize("case", sweep(), ids=str)
def test_equals_the_reference(case):
    tensors = case.make()
    expected = results("reference", tensors, **case.settings())
    found = results("eager", tensors, **case.settings())
    assert_near(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("T", [1, 40])
def test_every_set_of_options(number, T):
    case = Case((T, T), (2, 4, 6, 5), decay="gated", options=options(number, True))
    expected = results("reference", case.make(), **case.settings())
    assert_near(results("eager", case.make(), **case.settings()), expected, 1e-10)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_gates(delta, packed, dtype):
    lengths = (150, 33, 1) if packed else (150, 150)
    case = Case(lengths, packed=packed, delta=delta, decay="gated", strength=16.0)
    tensors = case.make(dtype)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = results("reference", exact, **case.settings())
    assert_near(results("eager", tensors, **case.settings()), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gates_of_all_sizes_in_one_chunk(dtype):
    # After a few tokens that forget nearly everything, others forget next to nothing: sums of log
    # decays are large and their differences small.
    case = Case((150,), (1, 2, 16, 8))
    tensors = case.make(dtype)
    tensors["log_decay"] *= 0.01
    tensors["log_decay"][:, ::6] = -40.0
    exact = {name: x.double() for name, x in tensors.items()}
    expected = results("reference", exact)
    assert_near(results("eager", tensors), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("T", [1, 70])
def test_write_strengths_zero_and_two_on_equal_keys(T):
    case = Case((T, T), (1, 2, 6, 4), strength=0.2)
    tensors = case.make()
    tensors["k"] = tensors["k"][:, :1].repeat(1, T, 1, 1)
    tensors["beta"] = torch.full_like(tensors["beta"], 2.0)
    tensors["beta"][:, ::3] = 0.0
    expected = results("reference", tensors)
    assert_near(results("eager", tensors), expected, 1e-9)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("T, where", [(1, 0), (70, 0), (70, 40), (70, 69)])
def test_a_decay_of_minus_infinity(delta, T, where):
    tensors = Case((T, T), delta=delta).make()
    tensors["log_decay"][:, where] = -torch.inf
    expected = results("reference", tensors)
    assert all(x.isfinite().all() for x in expected.values())
    assert_near(results("eager", tensors), expected, 1e-10)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("cut", [1, 32, 50, 96])
def test_the_gradient_flows_through_a_passed_state(delta, cut):
    tensors = Case((97, 97), (2, 4, 5, 3), delta=delta).make()
    whole = results("eager", tensors)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    state, outputs = leaves["initial_state"], []
    for part in (slice(0, cut), slice(cut, None)):
        pieces = {name: x[:, part] for name, x in leaves.items() if name != "initial_state"}
        o, state = call("eager", pieces | {"initial_state": state}, return_state=True)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad(weighted(o, state), list(leaves.values()))
    found = {"o": o, "state": state}
    found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    assert_near({name: x.detach() for name, x in found.items()}, whole, 1e-11)


@pytest.mark.parametrize(
    "case", [Case((40, 40)), Case((1, 1)), Case((9, 0, 70), packed=True)], ids=str
)
def test_inputs_that_are_not_contiguous(case):
    tensors = case.make()
    expected = results("eager", tensors, **case.settings())
    views = {name: scattered(x) for name, x in tensors.items()}
    assert not any(x.is_contiguous() for x in views.values() if x.numel() > 1)
    leaves = {name: x.requires_grad_() for name, x in views.items()}
    o, state = call("eager", leaves, return_state=True, **case.settings())
    # An expanded gradient of the outputs is not contiguous either.
    gradients = torch.autograd.grad(weighted(o, state), list(leaves.values()))
    found = {"o": o.detach(), "state": state.detach()}
    found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    assert_near(found, expected, 1e-12)


def test_an_expanded_output_gradient():
    tensors = Case((40, 40)).make()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    o, _ = call("eager", leaves)
    found = torch.autograd.grad(o.sum(), list(leaves.values()))
    o, _ = call("reference", leaves)
    expected = torch.autograd.grad(o.sum(), list(leaves.values()))
    names = list(leaves)
    assert_near(
        dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), 1e-10
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype, delta, packed):
    lengths = (100, 0, 33) if packed else (100, 100)
    sizes = (2, 4, 16, 8)
    case = Case(lengths, sizes, packed, delta, "gated", options=options(3, delta))
    tensors = case.make(dtype)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = results("reference", exact, **case.settings())
    found = results("eager", tensors, **case.settings())
    assert found["o"].dtype == dtype and found["state"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == dtype for name in tensors)
    assert_near(found, expected, TOLERANCE[dtype])
    # Everything inside is float32: the state has no rounding of the inputs' precision.
    assert_near({"state": found["state"]}, {"state": expected["state"]}, TOLERANCE[torch.float32])


def test_only_what_is_asked_for_gets_a_gradient():
    tensors = Case((40, 40)).make()
    tensors["v"].requires_grad_()
    o, _ = call("eager", tensors)
    (found,) = torch.autograd.grad(o.sum(), tensors["v"])
    o, _ = call("reference", tensors)
    (expected,) = torch.autograd.grad(o.sum(), tensors["v"])
    assert_near({"v": found}, {"v": expected}, 1e-10)
