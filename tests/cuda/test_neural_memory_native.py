"""The neural memory's chunks in C++ against the reference and the torch loop in float64."""

import pytest
import torch

from memlm.cuda import neural_memory
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.neural_memory import native
from memlm.cuda.neural_memory.chunks import Chunks
from tests.cuda.harness import assert_near, poisoned, scattered
from tests.cuda.test_neural_memory import make, run

pytestmark = pytest.mark.native(native.SOURCE)

NEAR = 1e-5  # after a memory of several layers in float32
NEAR_OF_A_LAYER = 3e-6
RESULTS = ("y", "W", "S", "dx", "da", "de", "dW", "dS", "dn", "dbeta", "dmu")


def assert_equals_the_reference(monkeypatch, case, **options):
    inputs, state, boundaries = case
    options |= {"read": "chunk_gates", "cu_seqlens": boundaries}
    expected = run(monkeypatch, "reference", inputs, state, **options)
    narrow = {name: x.float() for name, x in inputs.items()}
    found = run(monkeypatch, "native", narrow, state.map(torch.Tensor.float), **options)
    assert_near(found, expected, NEAR)


@pytest.mark.parametrize("chunk_size", [16, 17, 64])
@pytest.mark.parametrize("depth, gain, D", [(1, False, 24), (2, True, 16), (3, False, 16)])
def test_equals_the_reference(monkeypatch, depth, gain, D, chunk_size):
    case = make([70], depth, H=1, D=D, hidden=40, gain=gain)
    assert_equals_the_reference(monkeypatch, case, chunk_size=chunk_size, refresh="never")


@pytest.mark.parametrize("refresh", ["chunk", "never", 32])
def test_packed_sequences_resumed_inside_a_chunk(monkeypatch, refresh):
    case = make([37, 0, 50, 1], 2, D=16, hidden=24, packed=True, offset=[3, 0, 14, 15], gain=True)
    assert_equals_the_reference(monkeypatch, case, chunk_size=16, refresh=refresh)


def layer(rows, chunks, C, d_in, d_out, full=True):
    """What `Chunks` takes, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    T = chunks * C
    tokens = normal(rows, T, d_in), normal(rows, T, d_in) / C**0.5, normal(rows, T, d_out) / C**0.5
    states = normal(rows, d_in, d_out), normal(rows, d_in, d_out)
    gates = [x.sigmoid() for x in (normal(rows, T), normal(chunks, rows), normal(chunks, rows))]
    for gate in gates[1:]:
        gate[1:2] = 0.0
    joins = torch.ones(chunks, rows, dtype=torch.bool)
    joins[-1, ::2] = full
    return (*tokens, *states, *gates), joins


def results(walker, tensors, full, arrange=torch.clone):
    tensors = [x.detach().requires_grad_() for x in tensors]
    found = walker.apply(*map(arrange, tensors), full)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    gradients = torch.autograd.grad(
        found, tensors, [arrange(w.to(x.dtype)) for w, x in zip(weights, found, strict=True)]
    )
    return dict(zip(RESULTS, (*(x.detach() for x in found), *gradients), strict=True))


def single(tensors):
    return [x.float() for x in tensors]


SIZES = [
    # rows, chunks, C, d_in, d_out
    (1, 1, 16, 16, 16),
    (2, 3, 16, 24, 40),
    (3, 5, 17, 40, 24),
    (1, 2, 64, 130, 70),
    (2, 3, 16, 1, 50),
    (1, 4, 20, 70, 200),
    (1, 9, 16, 128, 65),
    (1, 4, 33, 2, 3),
]


@pytest.mark.parametrize("every", [2, 32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_a_layer_equals_the_torch_loop(monkeypatch, sizes, every, full):
    monkeypatch.setattr(native.Chunks, "kept_every", lambda size: every)
    tensors, joins = layer(*sizes, full)
    with poisoned():
        found = results(native.Chunks, single(tensors), joins)
    assert_near(found, results(Chunks, tensors, joins), NEAR_OF_A_LAYER)


@pytest.mark.parametrize("size, every", [(16, 32), (64, 32), (65, 16), (1500, 1), (5000, 1)])
def test_what_lies_in_the_workspace_is_bounded(size, every):
    assert native.Chunks.kept_every(size) == every


def test_tensors_that_are_not_contiguous():
    tensors, joins = layer(2, 3, 16, 24, 40)
    expected = results(native.Chunks, single(tensors), joins)
    found = results(native.Chunks, single(tensors), joins, scattered)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_of_one_result_alone(used):
    tensors, joins = layer(2, 3, 16, 24, 40)

    def gradients(walker, tensors):
        tensors = [x.requires_grad_() for x in tensors]
        found = walker.apply(*tensors, joins)[used]
        return dict(
            zip(RESULTS[3:], torch.autograd.grad(found.square().sum(), tensors), strict=True)
        )

    found = gradients(native.Chunks, single(tensors))
    assert_near(found, gradients(Chunks, tensors), NEAR_OF_A_LAYER)


def test_threads_share_the_rows(monkeypatch):
    tensors, joins = layer(5, 3, 16, 24, 40)
    threads = torch.get_num_threads()
    expected = results(native.Chunks, single(tensors), joins)
    monkeypatch.setattr(native, "PARALLEL", 1)
    try:
        torch.set_num_threads(3)
        found = results(native.Chunks, single(tensors), joins)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("size", [0, 1, 16, 1003])
def test_gelu_and_its_derivatives(size):
    x = torch.linspace(-12, 12, size, dtype=torch.float64)
    towards = [torch.randn(size, dtype=torch.float64) for _ in range(2)]

    def derivatives(functions, dtype):
        leaf = x.to(dtype).requires_grad_()
        value, (again, slope) = (function(leaf) for function in functions)
        assert torch.equal(value, again)
        (of_value,) = torch.autograd.grad(value, leaf, towards[0].to(dtype))
        (of_both,) = torch.autograd.grad((again, slope), leaf, [t.to(dtype) for t in towards])
        return {"value": value, "slope": slope, "dvalue": of_value, "dboth": of_both}

    expected = derivatives((Chunks.gelu, Chunks.gelu_with_slope), torch.float64)
    found = derivatives((native.Chunks.gelu, native.Chunks.gelu_with_slope), torch.float32)
    for name, exact in expected.items():
        torch.testing.assert_close(found[name].double(), exact, rtol=2e-6, atol=2e-6)


def test_gelu_of_what_diverged_shows():
    value, slope = native.gelu_with_slope(torch.tensor([1.0, torch.nan]))
    assert value.isnan().tolist() == slope.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "forced, walked",
    [("auto", True), ("native", True), ("auto,neural_memory=native", True), ("eager", False)],
)
def test_the_variable_chooses_the_loop(monkeypatch, forced, walked):
    monkeypatch.setenv(VARIABLE, forced)
    calls = []
    call = native._run
    monkeypatch.setattr(native, "_run", lambda *given: (calls.append(given[0]), call(*given)))
    inputs, state, _ = make([20], 1)
    inputs = {name: x.float().requires_grad_() for name, x in inputs.items()}
    options = {"chunk_size": 16, "read": "chunk_gates"}
    o, _ = neural_memory(**inputs, state=state.map(torch.Tensor.float), **options)
    o.sum().backward()
    assert bool(calls) is walked


@pytest.mark.parametrize(
    "dtype, options, reason",
    [
        (torch.float64, {"chunk_size": 16, "read": "chunk_gates"}, "float64"),
        (torch.float32, {"chunk_size": 8, "read": "chunk_gates"}, "chunks of 16 tokens or more"),
        (torch.float32, {"chunk_size": 16}, "read='chunk_gates'"),
    ],
)
def test_what_it_does_not_take(monkeypatch, dtype, options, reason):
    inputs, state, _ = make([20], 1)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(RuntimeError, match=f"native is unavailable for neural_memory: .*{reason}"):
        neural_memory(**inputs, state=state, **options)
    monkeypatch.setenv(VARIABLE, "auto")
    o, _ = neural_memory(**inputs, state=state, **options)
    assert o.dtype == dtype and o.isfinite().all()
