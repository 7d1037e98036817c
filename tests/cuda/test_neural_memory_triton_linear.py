"""The Triton kernels of the linear neural memory in their interpreter, against float64."""

from unittest import mock

import pytest
import torch

from memlm.cuda.neural_memory.gates import TileGates
from tests.cuda import neural_memory_tiles as tiles
from tests.cuda.harness import assert_near, poisoned

triton_linear = pytest.importorskip("memlm.cuda.neural_memory.triton_linear")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}


def expected_results(problem, refresh_every, exact):
    """Outputs, and gradients under random cotangents, in float64; the cotangents."""
    tokens, gates, states, counts = problem
    leaves = [*tokens.values(), *gates, *(x for (x,) in states.values())]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v = leaves[:3]
    anchor, weights, momentum = leaves[11:]
    tile = tiles.exact_linear_tile if exact else tiles.linear_tile
    o, (anchor_out,), (W,), (S,) = tiles.solve(
        tile,
        q,
        k,
        v,
        TileGates(*leaves[3:11]),
        (anchor,),
        (weights,),
        (momentum,),
        counts,
        refresh_every,
    )
    outputs = {"o": o, "anchor_out": anchor_out, "W": W, "S": S}
    if exact:
        del outputs["anchor_out"], leaves[11]
    cotangents = {name: torch.randn_like(x) for name, x in outputs.items()}
    gradients = torch.autograd.grad(list(outputs.values()), leaves, list(cotangents.values()))
    names = ["q", "k", "v", *TileGates._fields, "anchor", "weights", "momentum"]
    if exact:
        names.remove("anchor")
    found = {f"d{name}": x for name, x in zip(names, gradients, strict=True)}
    found["dG"] = found["dG"].tril()
    return {name: x.detach() for name, x in outputs.items()} | found, cotangents


def kernel_results(problem, cotangents, refresh_every, exact, dtype=torch.float32):
    """The same by the kernels."""
    tokens, gates, states, counts = problem
    q, k, v = (tokens[name].to(dtype) for name in "qkv")
    gates = TileGates(*(x.float() for x in gates))
    anchor, weights, momentum = (x.float() for (x,) in states.values())
    anchor = None if exact else anchor
    o, anchor_out, W, S, saved = triton_linear.forward(
        q, k, v, gates, anchor, weights, momentum, counts, refresh_every, exact, True
    )
    down = {name: x.to(dtype if name == "o" else torch.float32) for name, x in cotangents.items()}
    dq, dk, dv, dgates, danchor, dW, dS = triton_linear.backward(
        q,
        k,
        v,
        gates,
        anchor,
        counts,
        refresh_every,
        exact,
        saved,
        down["o"],
        down.get("anchor_out"),
        down["W"],
        down["S"],
    )
    found = {"o": o, "anchor_out": anchor_out, "W": W, "S": S, "dq": dq, "dk": dk, "dv": dv}
    found |= {f"d{name}": x for name, x in dgates._asdict().items()}
    found |= {"danchor": danchor, "dweights": dW, "dmomentum": dS}
    return {name: x for name, x in found.items() if x is not None}


def rounded(problem, dtype):
    """The problem as inputs of this type hold it."""
    tokens, gates, states, counts = problem
    tokens = {name: x.to(dtype).double() for name, x in tokens.items()}
    gates = TileGates(*(x.float().double() for x in gates))
    states = {name: tuple(x.float().double() for x in layers) for name, layers in states.items()}
    return tokens, gates, states, counts


def assert_kernels_near(problem, refresh_every, exact, dtype=torch.float32):
    problem = rounded(problem, dtype)
    expected, cotangents = expected_results(problem, refresh_every, exact)
    cotangents["o"] = cotangents["o"].to(dtype)
    with poisoned():
        found = kernel_results(problem, cotangents, refresh_every, exact, dtype)
    assert_near(found, expected, TOLERANCE[dtype])


RAGGED = (36, 7)  # three tiles of 16 and one
EVERY_RULE = [(0, False), (1, False), (2, False), (1, True)]


@pytest.mark.parametrize(("refresh_every", "exact"), EVERY_RULE)
def test_kernels_equal_the_tile_problem(refresh_every, exact):
    assert_kernels_near(tiles.make(RAGGED, 16, 16), refresh_every, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_several_blocks_of_channels(exact):
    # The second block of columns is not full.
    assert_kernels_near(tiles.make((10,), 16, 40), 1, exact)


@pytest.mark.parametrize(("C", "exact"), [(32, True), (64, False), (64, True)])
def test_longer_tiles(C, exact):
    assert_kernels_near(tiles.make((C + C // 2,), C, 16), 1, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_tiles_that_fill_no_block(exact):
    assert_kernels_near(tiles.make((10, 3), 5, 10), 1, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_half_precision(exact):
    assert_kernels_near(tiles.make((30,), 16, 32), 1, exact, torch.float16)


def assert_segments_near(lengths, refresh_every, exact):
    problem = tiles.make(lengths, 16, 16)
    with mock.patch.multiple(triton_linear, SEGMENT_BYTES=1, LEAST_STEPS=1):
        assert len(triton_linear.segments_of(problem[3], 16, refresh_every)) > 1
        assert_kernels_near(problem, refresh_every, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_segments_of_the_backward_pass_are_exact(exact):
    assert_segments_near((20, 7), 1, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("refresh_every", "exact"), EVERY_RULE)
def test_many_segments_are_exact(refresh_every, exact):
    assert_segments_near((130, 7, 20, 70), refresh_every, exact)


def test_segments():
    with mock.patch.multiple(triton_linear, SEGMENT_BYTES=8 * 16 * 16 * 12, LEAST_STEPS=2):
        # At most twelve tiles of states, but no fewer than two steps.
        assert triton_linear.segments_of([4] * 7, 16, 0) == [(0, 3), (3, 6), (6, 7)]
        assert triton_linear.segments_of([4] * 7, 16, 2) == [(0, 4), (4, 7)]
        assert triton_linear.segments_of([9, 9, 9, 1, 1], 16, 1) == [(0, 2), (2, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refresh_every", "exact"), [(0, False), (1, False), (2, False), (1, True)]
)
@pytest.mark.parametrize(("C", "D"), [(16, 256), (64, 100), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_memories(C, D, refresh_every, exact, dtype):
    problem = tiles.make((2 * C + 5, C - 3), C, D)
    assert_kernels_near(problem, refresh_every, exact, dtype)


def test_runs_and_rows_are_bit_equal():
    problem = tiles.make((20, 20), 16, 16)
    tokens, gates, states, counts = problem
    cotangents = expected_results(problem, 1, False)[1]
    first, both = (kernel_results(problem, cotangents, 1, False) for _ in range(2))
    second_row = (
        {name: x[1::2] for name, x in tokens.items()},
        TileGates(*(x[1::2] for x in gates)),
        {name: (x[1:],) for name, (x,) in states.items()},
        [1] * len(counts),
    )
    down = {name: x[1 :: 2 if name == "o" else 1] for name, x in cotangents.items()}
    alone = kernel_results(second_row, down, 1, False)
    states = ("anchor_out", "W", "S", "danchor", "dweights", "dmomentum")
    for name, x in alone.items():
        assert torch.equal(first[name], both[name]), name
        assert torch.equal(x, both[name][1 :: 1 if name in states else 2]), name


def test_a_gate_that_diverged_shows():
    tokens, gates, states, counts = tiles.make((20,), 16, 16)
    gates.beta_end[0] = torch.nan
    cotangents = expected_results((tokens, gates, states, counts), 1, False)[1]
    found = kernel_results((tokens, gates, states, counts), cotangents, 1, False)
    assert found["o"][1:].isnan().any() and found["W"].isnan().all()
    assert found["dweights"].isnan().all()
