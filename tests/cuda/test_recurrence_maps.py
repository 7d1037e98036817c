"""Runs of tokens as maps of the state before them: the recurrence itself, cut in two."""

import os
from unittest import mock

import pytest
import torch

from memlm.cuda import diagonal_scan
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.recurrence_maps import diagonal_scan_map, linear_recurrence_map
from tests.cuda.harness import TOLERANCE, assert_near
from tests.cuda.recurrence_cases import Case, results, weighted

FLOAT64 = torch.float64
ALL_OPTIONS = ("qk_l2norm", "beta_sigmoid", "allow_neg_eigval")
PACKED = (3, 0, 70, 1, 0)
CASES = (
    Case((70, 70), sizes=(1, 2, 5, 3), decay="gated", options=ALL_OPTIONS),
    Case(PACKED, sizes=(2, 6, 3, 8), packed=True, decay="gated", options=ALL_OPTIONS),
    Case(PACKED, packed=True, decay="scalar"),
    Case((9,), sizes=(2, 2, 16, 9), decay="none"),
    Case((0, 0), decay="none"),
    Case((9, 9), decay="const", delta=True),
    Case((1, 1), decay="gated"),
    Case(PACKED, sizes=(1, 2, 4, 6), packed=True, decay="const", delta=False),
    Case(PACKED, sizes=(2, 6, 3, 8), packed=True, delta=False, options=("qk_l2norm",)),
    Case((70, 70), decay="gated", delta=False, strength=8.0),
    Case((9,), decay="none", delta=False),
    Case((0, 0), delta=False),
    Case((0,), packed=True, delta=False),
)


def continued(tensors, state, settings):
    """Outputs and final states of the recurrence from its maps."""
    run = linear_recurrence_map(**{"log_decay": None, "beta": None} | tensors, **settings)
    bounds = settings.get("cu_seqlens")
    if bounds is None:
        read = torch.einsum("bthk,bhkv->bthv", run.reads, state)
    else:
        owner = torch.repeat_interleave(bounds.diff())
        read = torch.einsum("bthk,thkv->bthv", run.reads, state[owner])
    moved = run.transition
    moved = moved @ state if moved.ndim == 4 else moved[..., None, None] * state
    return run.output + read, moved + run.addend


@pytest.mark.parametrize("case", CASES, ids=str)
def test_map_of_any_state_is_the_recurrence(case):
    """Outputs, final states and the gradients of all inputs."""
    tensors, settings = case.make(), case.settings()
    expected = results("reference", tensors, **settings)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    given = {name: x for name, x in leaves.items() if name != "initial_state"}
    with mock.patch.dict(os.environ, {VARIABLE: "eager"}):
        o, state = continued(given, leaves["initial_state"], settings)
        # Without tokens as well: processes wait for the gradients of each other's maps.
        assert o.requires_grad and state.requires_grad
        found = torch.autograd.grad(
            weighted(o, state), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    got = {"o": o.detach(), "state": state.detach()}
    got |= {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    assert_near(got, expected, TOLERANCE[FLOAT64])


@pytest.mark.parametrize("delta", [True, False])
def test_maps_of_two_runs_make_the_map_of_one(delta):
    case = Case((40, 40), sizes=(1, 2, 8, 4), delta=delta, initial_state=False)
    tensors = case.make()
    halves = [
        {name: x[:, part] for name, x in tensors.items()} for part in (slice(17), slice(17, 40))
    ]
    given = {"beta": None}
    first, second = (linear_recurrence_map(**given | half) for half in halves)
    whole = linear_recurrence_map(**given | tensors)
    if delta:
        product = second.transition @ first.transition
        addend = second.transition @ first.addend + second.addend
    else:
        product = second.transition * first.transition
        addend = second.transition[..., None, None] * first.addend + second.addend
    found = {"transition": product, "addend": addend}
    expected = {"transition": whole.transition, "addend": whole.addend}
    assert_near(found, expected, TOLERANCE[FLOAT64])


def test_what_fades_below_the_smallest_number_is_zero():
    tensors = {name: x.float() for name, x in Case((8,), delta=False).make().items()}
    tensors.pop("initial_state")
    tensors["log_decay"] = torch.full_like(tensors["log_decay"], -50.0).requires_grad_()
    with mock.patch.dict(os.environ, {VARIABLE: "eager"}):
        run = linear_recurrence_map(beta=None, **tensors)
    assert (
        run.transition.eq(0).all() and run.reads[:, 1:].eq(0).all() and run.reads[:, 0].ne(0).all()
    )
    (gradient,) = torch.autograd.grad(run.reads.sum() + run.transition.sum(), tensors["log_decay"])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "native", "triton"])
@pytest.mark.parametrize("delta", [True, False])
def test_every_implementation_gives_the_map(implementation, delta):
    options = ALL_OPTIONS if delta else ()
    case = Case((70,), sizes=(1, 2, 16, 32), decay="gated", delta=delta, options=options)
    tensors = {name: x.float() for name, x in case.make().items()}
    state = tensors.pop("initial_state")
    exact = {name: x.double() for name, x in tensors.items()}
    with mock.patch.dict(os.environ, {VARIABLE: "reference"}):
        expected = continued(exact, state.double(), case.settings())
    with mock.patch.dict(os.environ, {VARIABLE: implementation}):
        got = continued(tensors, state, case.settings())
    names = ("o", "state")
    assert_near(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)), 1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_diagonal_map_of_any_state_is_the_scan(packed):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 17, 1] if packed else [9, 9]
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    a, b = (torch.randn(B, T, 5, generator=generator, dtype=FLOAT64) for _ in "ab")
    state = torch.randn(len(lengths), 5, generator=generator, dtype=FLOAT64)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    owner = torch.repeat_interleave(torch.tensor(lengths)).view(B, T) if packed else None
    leaves = [x.requires_grad_() for x in (a, b, state)]

    run = diagonal_scan_map(a, b, bounds)
    before = state[owner] if packed else state[:, None]
    got = (run.output + run.reads * before, run.transition * state + run.addend)
    expected = diagonal_scan(a, b, state, bounds, return_state=True)
    names = ("h", "state", "da", "db", "dstate")
    found = []
    for h, final in (got, expected):
        gradients = torch.autograd.grad(weighted(h, final), leaves)
        found.append(dict(zip(names, (h.detach(), final.detach(), *gradients), strict=True)))
    assert_near(*found, TOLERANCE[FLOAT64])
