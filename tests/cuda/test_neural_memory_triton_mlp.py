"""The Triton kernels of the neural memory of two layers in their interpreter, against float64."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from memlm.cuda.dispatch import compiling_for
from memlm.cuda.neural_memory.gates import TileGates
from tests.cuda import neural_memory_tiles as tiles
from tests.cuda.harness import assert_deterministic, assert_near, poisoned

triton_mlp = pytest.importorskip("memlm.cuda.neural_memory.triton_mlp")
triton_mlp_problem = pytest.importorskip("memlm.cuda.neural_memory.triton_mlp_problem")

STATES = ("anchor", "weights", "momentum")


def mlp_tile(q, k, v, gates, anchor, weights, momentum):
    """x + LN(gelu(x W1) W2), the errors by autograd."""

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)

    Z1 = k @ anchor[0]
    inputs = (k, F.gelu(Z1))
    Z2 = inputs[1] @ anchor[1]
    loss = (k + norm(Z2) - v).square().sum()
    errors = torch.autograd.grad(loss, (Z1, Z2), create_graph=True)
    read = q
    layers = zip(inputs, errors, weights, momentum, strict=True)
    advanced = []
    for depth, (x, error, W, S) in enumerate(layers):
        read = tiles.read(read if depth == 0 else F.gelu(read), x, error, gates, W, S)
        advanced.append(tiles.advance(x, error, gates, W, S))
    return q + norm(read), *zip(*advanced, strict=True)


def named(o, states, gradients=()):
    """Results by name; gradients are those of q, k, v, the gates and the states' layers."""
    found = {"o": o}
    for name, layers in zip(STATES, states, strict=True):
        found |= {f"{name}{i}": x for i, x in enumerate(layers)}
    names = [*"qkv", *TileGates._fields, *(f"{name}{i}" for name in STATES for i in range(2))]
    return found | {f"d{name}": x for name, x in zip(names, gradients, strict=False)}


def expected_results(problem, refresh_every):
    """Outputs, and gradients under random cotangents, in float64; the cotangents."""
    tokens, gates, states, counts = problem
    leaves = [*tokens.values(), *gates, *(x for layers in states.values() for x in layers)]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    layers = [tuple(leaves[i : i + 2]) for i in (11, 13, 15)]
    o, *ends = tiles.solve(
        mlp_tile, *leaves[:3], TileGates(*leaves[3:11]), *layers, counts, refresh_every
    )
    outputs = [o, *(x for pair in ends for x in pair)]
    cotangents = [torch.randn_like(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    found = named(o.detach(), [[x.detach() for x in pair] for pair in ends], gradients)
    found["dG"] = found["dG"].tril()
    return found, cotangents


def kernel_results(problem, cotangents, refresh_every, dtype=torch.float32):
    """The same by the kernels."""
    tokens, gates, states, counts = problem
    tokens = [tokens[name].to(dtype) for name in "qkv"]
    gates = TileGates(*(x.float() for x in gates))
    layers = [tuple(x.float() for x in states[name]) for name in STATES]
    o, *ends, saved = triton_mlp.forward(*tokens, gates, *layers, counts, refresh_every, True)
    down = [tuple(x.float() for x in cotangents[i : i + 2]) for i in (1, 3, 5)]
    dq, dk, dv, dgates, *dlayers = triton_mlp.backward(
        *tokens, gates, counts, refresh_every, saved, cotangents[0].to(dtype), *down
    )
    gradients = [dq, dk, dv, *dgates, *(x for pair in dlayers for x in pair)]
    return named(o, ends, gradients)


def assert_kernels_near(problem, refresh_every, dtype=torch.float32, tolerance=2e-5):
    expected, cotangents = expected_results(problem, refresh_every)
    with poisoned():
        found = kernel_results(problem, cotangents, refresh_every, dtype)
    assert_near(found, expected, tolerance)


@pytest.fixture
def short_groups():
    """Groups of two steps and slices of 16 hidden channels."""
    config = triton_mlp.Config(16, 4)
    names = ("write_config", "walk_config", "reverse_config")
    patches = {name: lambda *_: config for name in names}
    groups = mock.patch.object(triton_mlp_problem, "GROUP", 2)
    with groups, mock.patch.multiple(triton_mlp, **patches):
        yield


@pytest.mark.parametrize(
    ("lengths", "D", "hidden", "refresh_every"),
    [
        ((33,), 16, 32, 1),
        ((40, 5), 12, 20, 2),
        ((17,), 16, 16, 0),
    ],
)
def test_kernels_equal_autograd_in_float64(short_groups, lengths, D, hidden, refresh_every):
    problem = tiles.make(lengths, 16, D, layers=2, hidden=hidden)
    assert_kernels_near(problem, refresh_every)


def test_weights_that_stay_in_registers_and_half_precision():
    problem = tiles.make((32,), 16, 16, layers=2, hidden=16)
    assert triton_mlp.write_config(16, 16, 16, 90).resident
    assert_kernels_near(problem, 1, torch.float16, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "C", "D", "hidden", "refresh_every"),
    [
        ((70, 33, 1), 16, 32, 128, 1),
        ((70, 64), 32, 24, 100, 2),
        ((130, 65), 64, 32, 96, 1),
        ((100, 7), 16, 40, 64, 3),
    ],
)
def test_every_tile_size(lengths, C, D, hidden, refresh_every):
    problem = tiles.make(lengths, C, D, layers=2, hidden=hidden)
    assert_kernels_near(problem, refresh_every, tolerance=1e-4)


@pytest.mark.slow
def test_runs_are_equal(short_groups):
    problem = tiles.make((33, 16), 16, 16, layers=2, hidden=32)
    _, cotangents = expected_results(problem, 1)
    assert_deterministic(lambda: kernel_results(problem, cotangents, 1))


def test_older_cards_take_the_shortest_tiles():
    with compiling_for(80):
        assert triton_mlp.longest_tile(torch.device("cpu")) == 16
    with compiling_for(90):
        assert triton_mlp.longest_tile(torch.device("cpu")) == 64
