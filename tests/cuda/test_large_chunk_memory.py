import itertools

import pytest
import torch
from torch.nn import functional as F

from memlm.cuda import LargeChunkMemoryState, large_chunk_memory
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.large_chunk_memory import eager
from memlm.cuda.large_chunk_memory.state import channel_norm, orthogonal

FLOAT64 = torch.float64
FIELDS = ("weights", "momentum", "pending")
WAYS = pytest.mark.parametrize(
    "momentum, orthogonalise", [(True, False), (False, False), (True, True)]
)


def make(lengths, momentum=True, H=2, D=3, hidden=5, packed=False, offset=None, seed=0):
    """Float64 inputs with unit queries and keys, and a state in mid-stream."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=FLOAT64)

    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    N = len(lengths)
    inputs = {name: normal(B, T, H, D) for name in ("q", "k", "v")}
    inputs |= {name: F.normalize(inputs[name], dim=-1) for name in ("q", "k")}
    inputs["steps"] = 0.3 * normal(B, T, H, 3).sigmoid()
    inputs["eta"] = normal(B, T, H).sigmoid() if momentum else None
    shapes = [(N, H, D, 2 * hidden), (N, H, hidden, D)]
    layers = [tuple(scale * normal(*shape) for shape in shapes) for scale in (1, 0.3, 0.3)]
    offset = torch.zeros(N, dtype=torch.int64) if offset is None else torch.tensor(offset)
    gate_sum = offset[:, None] * normal(N, H).sigmoid()
    boundaries = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    return inputs, LargeChunkMemoryState(*layers, gate_sum, offset), boundaries


def tensors(state):
    """The tensors of a state by name."""
    found = {f"{name}{i}": x for name in FIELDS for i, x in enumerate(getattr(state, name))}
    return found | {"gate_sum": state.gate_sum}


def run(monkeypatch, implementation, inputs, state, **options):
    """Outputs, final state, and gradients of a fixed random function of both."""
    monkeypatch.setenv(VARIABLE, implementation)
    inputs = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    state = state.map(lambda x: x.clone().requires_grad_())
    o, final = large_chunk_memory(**inputs, state=state, **options)
    leaves = {name: x for name, x in inputs.items() if x is not None} | tensors(state)
    results = {"o": o} | tensors(final)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
        for x in results.values()
    )
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"offset": final.offset} | {name: x.detach() for name, x in results.items()}


def assert_equal(monkeypatch, inputs, state, **options):
    expected = run(monkeypatch, "reference", inputs, state, **options)
    got = run(monkeypatch, "eager", inputs, state, **options)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@WAYS
@pytest.mark.parametrize("T, chunk_size", [(0, 4), (1, 4), (4, 4), (11, 4), (5, 8), (6, 1)])
def test_eager_equals_reference(monkeypatch, momentum, orthogonalise, T, chunk_size):
    inputs, state, _ = make([T, T], momentum)
    assert_equal(monkeypatch, inputs, state, chunk_size=chunk_size, orthogonalise=orthogonalise)


@WAYS
@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 0, 9, 1], [0, 0, 0], [1, 1, 1], [0, 5, 2]])
def test_packed_sequences_resumed_inside_a_chunk(monkeypatch, momentum, orthogonalise, lengths):
    inputs, state, boundaries = make(
        lengths, momentum, packed=True, offset=[0, 3, 1, 2][: len(lengths)]
    )
    assert_equal(
        monkeypatch,
        inputs,
        state,
        chunk_size=4,
        orthogonalise=orthogonalise,
        cu_seqlens=boundaries,
    )


def test_a_batch_of_rows_at_different_offsets(monkeypatch):
    inputs, state, _ = make([6, 6, 6], offset=[0, 2, 3])
    assert_equal(monkeypatch, inputs, state, chunk_size=4)


@pytest.mark.parametrize(
    "lengths, offset, size",
    [
        ([300, 65, 3, 512], [0, 200, 255, 10], 64),  # chunks end in different steps
        ([256, 256], [0, 0], 256),
        ([100, 20, 131], [5, 0, 125], 66),  # all within one chunk, the last one completes it
    ],
)
def test_tiles_that_are_parts_of_a_chunk(monkeypatch, lengths, offset, size):
    inputs, state, boundaries = make(lengths, packed=True, offset=offset)
    layout, complete = eager._plan(torch.tensor(lengths), state.offset, 256)
    assert layout.size == size
    assert sum(map(sum, complete)) == sum(
        (length + seen) // 256 for length, seen in zip(lengths, offset, strict=True)
    )
    assert_equal(monkeypatch, inputs, state, chunk_size=256, cu_seqlens=boundaries)


@WAYS
@pytest.mark.parametrize("split", [(23,), (1,) * 23, (5, 13, 5), (8, 8, 7), (1, 0, 7, 9, 6)])
def test_ragged_splits_are_exact(momentum, orthogonalise, split):
    inputs, state, _ = make([23, 23], momentum)
    options = {"chunk_size": 8, "orthogonalise": orthogonalise}
    whole, last = large_chunk_memory(**inputs, state=state, **options)
    pieces, start = [], 0
    for length in split:
        span = slice(start, start + length)
        part = {name: None if x is None else x[:, span] for name, x in inputs.items()}
        o, state = large_chunk_memory(**part, state=state, **options)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(state.offset, last.offset) and state.offset.tolist() == [7, 7]
    for name, x in tensors(state).items():
        torch.testing.assert_close(x, tensors(last)[name], rtol=1e-10, atol=1e-10)


def test_packed_equals_one_by_one():
    inputs, state, boundaries = make([5, 0, 9, 1], packed=True, offset=[1, 0, 2, 3])
    together, final = large_chunk_memory(**inputs, state=state, chunk_size=4, cu_seqlens=boundaries)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        alone = state.map(lambda x, i=i: x[i : i + 1])
        alone.offset = state.offset[i : i + 1]
        part = {name: x[:, start:end] for name, x in inputs.items()}
        o, last = large_chunk_memory(**part, state=alone, chunk_size=4)
        torch.testing.assert_close(together[:, start:end], o)
        for name, x in tensors(last).items():
            torch.testing.assert_close(tensors(final)[name][i : i + 1], x)
        assert final.offset[i] == last.offset[0]


def test_one_chunk_by_hand():
    # One head, one channel, one hidden unit, chunks of two tokens: everything is a number, and
    # rescaling leaves a weight only its sign.
    one = torch.ones(1, 1, 1, 1, dtype=FLOAT64)
    w1, w3, w2 = 0.5, -0.7, 0.2
    up = torch.cat((w1 * one, w3 * one), -1)
    zeros = (torch.zeros_like(up), torch.zeros_like(one))
    state = LargeChunkMemoryState(
        (up, w2 * one),
        (0.5 * torch.ones_like(up), -one),
        zeros,
        torch.zeros(1, 1, dtype=FLOAT64),
        torch.zeros(1, dtype=torch.int64),
    )
    k, v, q = (torch.tensor([[[[a]], [[b]]]], dtype=FLOAT64) for a, b in ((2, 1), (3, -1), (1, 4)))
    steps = torch.tensor([[[[0.1, 0.2, 0.3]], [[1.0, 2.0, 3.0]]]], dtype=FLOAT64)
    eta = torch.tensor([[[0.2], [0.6]]], dtype=FLOAT64)
    o, final = large_chunk_memory(q, k, v, steps, eta, state, chunk_size=2)

    def silu(x):
        return F.silu(torch.tensor(x, dtype=FLOAT64)).item()

    assert o.flatten().tolist() == pytest.approx([silu(w1 * x) * w3 * x * w2 for x in (1.0, 4.0)])
    x = torch.tensor(w1, dtype=FLOAT64, requires_grad=True)
    slopes = [torch.autograd.grad(F.silu(x * key), x)[0].item() for key in (2.0, 1.0)]
    g1 = 0.1 * slopes[0] * w3 * 2 * w2 * 3 - 1.0 * slopes[1] * w3 * w2
    g3 = 0.2 * silu(w1 * 2.0) * 2 * w2 * 3 - 2.0 * silu(w1) * w2
    g2 = 0.3 * silu(w1 * 2.0) * w3 * 2 * 3 - 3.0 * silu(w1) * w3
    momentum = [0.4 * 0.5 + g1, 0.4 * 0.5 + g3, 0.4 * -1 + g2]
    found = torch.cat([x.flatten() for x in final.momentum]).tolist()
    assert found == pytest.approx(momentum)
    signs = [(w + s) / abs(w + s) for w, s in zip((w1, w3, w2), momentum, strict=True)]
    found = torch.cat([x.flatten() for x in final.weights]).tolist()
    assert found == pytest.approx([s * abs(w) for s, w in zip(signs, (w1, w3, w2), strict=True)])
    assert signs == [1, -1, -1]  # W2 has turned round
    assert final.offset.item() == 0 and final.gate_sum.item() == 0
    assert all(not x.any() for x in final.pending)


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_channels_keep_their_norms_and_weights_learn(orthogonalise):
    inputs, state, _ = make([32], D=8, hidden=16)
    inputs["k"][:, 16:] = inputs["q"][:, 16:] = inputs["k"][:, :16]
    inputs["v"][:, 16:] = inputs["v"][:, :16]
    state.pending = tuple(map(torch.zeros_like, state.pending))
    state.momentum = tuple(map(torch.zeros_like, state.momentum))
    o, final = large_chunk_memory(**inputs, state=state, chunk_size=16, orthogonalise=orthogonalise)
    for before, after in zip(state.weights, final.weights, strict=True):
        torch.testing.assert_close(channel_norm(after), channel_norm(before))
        assert (after - before).norm() > 0.1 * before.norm()
    before, _ = large_chunk_memory(
        **{**inputs, "q": inputs["k"]}, state=state, chunk_size=64, orthogonalise=orthogonalise
    )
    agreement = [F.cosine_similarity(x[:, 16:], inputs["v"][:, 16:], dim=-1) for x in (before, o)]
    assert agreement[1].mean() > agreement[0].mean() + 0.2


def test_orthogonalisation_maps_singular_values_alone():
    x = torch.randn(2, 7, 4, dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() > 0.6 and s.max() < 1.3
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(orthogonal(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(orthogonal(x.mT), expected.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_nothing_learned_leaves_the_weights_as_they_are(orthogonalise):
    inputs, state, _ = make([9])
    inputs["steps"] = torch.zeros_like(inputs["steps"])
    state.pending = tuple(map(torch.zeros_like, state.pending))
    state.momentum = tuple(map(torch.zeros_like, state.momentum))
    _, final = large_chunk_memory(**inputs, state=state, chunk_size=4, orthogonalise=orthogonalise)
    for before, after in zip(state.weights, final.weights, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-14, atol=0)


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_low_precision_inputs_keep_a_float32_state(orthogonalise):
    inputs, state, _ = make([9, 9], D=16, hidden=16)
    options = {"state": state, "chunk_size": 4, "orthogonalise": orthogonalise}
    exact, _ = large_chunk_memory(**inputs, **options)
    low = {name: x.bfloat16() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, final = large_chunk_memory(**low, **options)
    assert o.dtype == torch.bfloat16
    assert {x.dtype for x in tensors(final).values()} == {torch.float32}
    assert (o.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 3, 2, 4)}, "k is"),
        ({"steps": torch.zeros(1, 3, 2)}, "steps is"),
        ({"eta": torch.zeros(1, 3, 1)}, "eta is"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"state": make([3, 3])[1]}, "the state's weights"),
    ],
)
def test_shapes_are_checked(change, message):
    inputs, state, _ = make([3])
    with pytest.raises(ValueError, match=message):
        large_chunk_memory(**inputs | {"state": state, "chunk_size": 4} | change)
