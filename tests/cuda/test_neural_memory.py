import importlib
import itertools

import pytest
import torch

from memlm.cuda import NeuralMemoryState, neural_memory
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.neural_memory import eager
from memlm.cuda.neural_memory import inputs as operation_inputs
from memlm.cuda.neural_memory.tiles import TileSizes

# The package's attribute of that name is the function.
OPERATION = importlib.import_module("memlm.cuda.neural_memory")
FLOAT64 = torch.float64
INPUTS = ("q", "k", "v", "alpha", "eta", "theta")


def make(
    lengths, depth, H=2, D=3, hidden=5, packed=False, offset=None, seed=0, gain=False, exact=False
):
    """Float64 inputs in a stable regime (unit keys, small steps) and a state in mid-stream."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=FLOAT64)

    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    N = len(lengths)
    inputs = {name: normal(B, T, H, D) for name in ("q", "k", "v")}
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    inputs["alpha"] = 0.1 * normal(B, T, H).sigmoid()
    inputs["eta"] = normal(B, T, H).sigmoid()
    inputs["theta"] = 0.05 * normal(B, T, H).sigmoid()
    widths = [D, *[hidden] * (depth - 1), D]
    shapes = [(N, H, *pair) for pair in itertools.pairwise(widths)] + [(N, H, D)] * gain
    layers = [tuple(normal(*shape) for shape in shapes) for _ in range(2)]
    momentum = tuple(0.1 * normal(*shape) for shape in shapes)
    offset = torch.zeros(N, dtype=torch.int64) if offset is None else torch.tensor(offset)
    boundaries = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    layers[0] = () if exact else layers[0]
    return inputs, NeuralMemoryState(*layers, momentum, offset), boundaries


def run(
    monkeypatch,
    implementation,
    inputs,
    state,
    chunk_size,
    cu_seqlens=None,
    return_statistics=True,
    **options,
):
    """Outputs, final state, and gradients of a fixed random function of both."""
    monkeypatch.setenv(VARIABLE, implementation)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    state = state.map(lambda x: x.clone().requires_grad_())
    o, final, *statistics = neural_memory(
        **leaves,
        state=state,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        return_statistics=return_statistics,
        **options,
    )
    results = {"o": o}
    names = ("anchor", "weights", "momentum")
    for name in names:
        results |= {f"{name}{i}": x for i, x in enumerate(getattr(final, name))}
        leaves |= {f"{name}{i}": x for i, x in enumerate(getattr(state, name))}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=FLOAT64)).sum()
        for x in results.values()
    )
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    for found in statistics:
        results |= found._asdict()
    return {"offset": final.offset} | {name: x.detach() for name, x in results.items()}


def assert_equal(monkeypatch, inputs, state, chunk_size, cu_seqlens=None, **options):
    expected = run(monkeypatch, "reference", inputs, state, chunk_size, cu_seqlens, **options)
    got = run(monkeypatch, "eager", inputs, state, chunk_size, cu_seqlens, **options)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("T, chunk_size", [(0, 4), (1, 4), (4, 4), (11, 4), (5, 8), (6, 1)])
def test_eager_equals_reference(monkeypatch, depth, T, chunk_size):
    inputs, state, _ = make([T, T], depth)
    assert_equal(monkeypatch, inputs, state, chunk_size)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 0, 9, 1], [0, 0, 0], [1, 1, 1], [0, 5, 2]])
def test_packed_sequences_resumed_inside_a_chunk(monkeypatch, depth, lengths):
    offset = [0, 3, 1, 2][: len(lengths)]
    inputs, state, boundaries = make(lengths, depth, packed=True, offset=offset)
    assert_equal(monkeypatch, inputs, state, 4, boundaries)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_batch_of_rows_at_different_offsets(monkeypatch, depth):
    inputs, state, _ = make([6, 6, 6], depth, offset=[0, 2, 3])
    assert_equal(monkeypatch, inputs, state, 4)


OPTIONS = [
    {"read": "chunk_start"},
    {"read": "chunk_gates"},
    {"read": "chunk_gates", "refresh": "never"},
    {"refresh": "never"},
    {"refresh": 8},
    {"clip": 1.0},
    {"clip": 1.0, "read": "chunk_gates", "refresh": 8},
]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_convention_equals_the_reference(monkeypatch, depth, options):
    inputs, state, boundaries = make(
        [9, 0, 6], depth, packed=True, offset=[3, 0, 2], gain=depth == 3
    )
    assert_equal(monkeypatch, inputs, state, 4, boundaries, **options)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("gain", [False, True])
def test_deep_memories_equal_the_reference(monkeypatch, depth, gain):
    inputs, state, _ = make([7, 7], depth, gain=gain)
    assert_equal(monkeypatch, inputs, state, 4)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[11], [3, 0, 9, 1]])
def test_exact_equals_the_reference(monkeypatch, chunk_size, lengths):
    inputs, state, boundaries = make(lengths, 1, packed=True, exact=True)
    inputs["theta"] *= 10
    assert_equal(monkeypatch, inputs, state, chunk_size, boundaries, exact=True)


def test_exact_is_the_memory_with_chunks_of_one_token():
    inputs, state, _ = make([13, 13], 1)
    o, final = neural_memory(**inputs, state=state, chunk_size=1)
    exact = NeuralMemoryState((), state.weights, state.momentum, state.offset)
    # The first gradient is taken at the anchor, which for a state in mid-stream is not its weights.
    state.anchor[0].copy_(state.weights[0])
    o, final = neural_memory(**inputs, state=state, chunk_size=1)
    for chunk_size in (8, 16, 64, 128):
        o_exact, last = neural_memory(**inputs, state=exact, chunk_size=chunk_size, exact=True)
        torch.testing.assert_close(o_exact, o, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(last.weights, final.weights, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(last.momentum, final.momentum, rtol=1e-11, atol=1e-11)
        assert last.anchor == ()


@pytest.mark.parametrize("tile", [3, 4, 256])
@pytest.mark.parametrize(
    "options", [{}, {"refresh": "never"}, {"refresh": 24}, {"exact": True}, {"read": "chunk_start"}]
)
def test_tiles_are_a_matter_of_speed(monkeypatch, tile, options):
    exact = options.get("exact", False)
    inputs, state, _ = make([40, 40], 1 if exact else 2, offset=[0, 5], exact=exact)
    whole = run(monkeypatch, "eager", inputs, state, 12, **options)
    monkeypatch.setattr(OPERATION, "TileSizes", lambda longest: TileSizes(tile))
    tiled = run(monkeypatch, "eager", inputs, state, 12, **options)
    for name in whole:
        torch.testing.assert_close(tiled[name], whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth, gain", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("refresh", ["never", "chunk", 8])
def test_chunks_as_whole_tiles(monkeypatch, depth, gain, refresh):
    monkeypatch.setattr(operation_inputs, "SHORTEST_WHOLE_CHUNK", 1)
    inputs, state, boundaries = make(
        [9, 0, 6, 1], depth, packed=True, offset=[3, 0, 2, 3], gain=gain
    )
    inputs["eta"][:, 3] = 0.0
    inputs["theta"][:, 3] = 0.0
    options = {"read": "chunk_gates", "refresh": refresh}
    assert_equal(monkeypatch, inputs, state, 4, boundaries, **options)


@pytest.mark.parametrize("lengths", [[21, 21], [17, 0, 30, 2]])
def test_recomputed_groups_have_the_same_gradients(monkeypatch, lengths):
    inputs, state, boundaries = make(lengths, 2, packed=True)
    whole = run(monkeypatch, "eager", inputs, state, 4, boundaries)
    monkeypatch.setattr(eager, "GROUP_BYTES", 1)
    in_groups = run(monkeypatch, "eager", inputs, state, 4, boundaries)
    for name in whole:
        torch.testing.assert_close(in_groups[name], whole[name], rtol=1e-12, atol=1e-12)


def test_memory_grows_by_the_state_per_group_of_tiles(monkeypatch):
    # What autograd holds on to after the forward pass, by kind of growth.
    def held(tokens):
        inputs, state, _ = make([tokens], 2, D=8, hidden=64)
        state = state.map(lambda x: x.requires_grad_())
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, _ = neural_memory(**inputs, state=state, chunk_size=8)
        assert o.requires_grad
        return sum(kept.values())

    per_token = (held(1024) - held(512)) / 512
    monkeypatch.setattr(eager, "GROUP_BYTES", 2**20)
    grouped = (held(1024) - held(512)) / 512
    assert grouped < per_token / 4


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("split", [(40, 56), (7, 16, 3, 20, 1, 1, 48)])
def test_published_splits_are_exact(depth, options, split):
    inputs, state, _ = make([96], depth)
    whole, last = neural_memory(**inputs, state=state, chunk_size=16, **_at_16(options))
    pieces = []
    for length, end in zip(split, itertools.accumulate(split), strict=True):
        part = {name: x[:, end - length : end] for name, x in inputs.items()}
        o, state = neural_memory(**part, state=state, chunk_size=16, **_at_16(options))
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    for part in ("anchor", "weights", "momentum"):
        torch.testing.assert_close(getattr(state, part), getattr(last, part), rtol=1e-9, atol=1e-9)


def _at_16(options):
    return options | ({"refresh": 32} if options.get("refresh") == 8 else {})


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("split", [(23,), (1,) * 23, (5, 13, 5), (8, 8, 7), (1, 0, 7, 9, 6)])
def test_ragged_splits_are_exact(depth, split):
    inputs, state, _ = make([23, 23], depth)
    whole, last = neural_memory(**inputs, state=state, chunk_size=8)
    pieces, start = [], 0
    for length in split:
        part = {name: x[:, start : start + length] for name, x in inputs.items()}
        o, state = neural_memory(**part, state=state, chunk_size=8)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(state.offset, last.offset) and state.offset.tolist() == [7, 7]
    for part in ("anchor", "weights", "momentum"):
        for a, b in zip(getattr(state, part), getattr(last, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "depth, options",
    [(1, {"exact": True}), *itertools.product([1, 2, 3], [{}, *OPTIONS])],
    ids=str,
)
def test_tokens_one_by_one_without_gradients(depth, options):
    exact = options.get("exact", False)
    inputs, state, _ = make([9, 9], depth, offset=[0, 3], gain=depth == 3, exact=exact)
    whole, last, statistics = neural_memory(
        **inputs, state=state, chunk_size=4, return_statistics=True, **options
    )
    with torch.no_grad():
        for t in range(9):
            part = {name: x[:, t : t + 1] for name, x in inputs.items()}
            o, state, found = neural_memory(
                **part, state=state, chunk_size=4, return_statistics=True, **options
            )
            torch.testing.assert_close(o, whole[:, t : t + 1], rtol=1e-10, atol=1e-10)
            for a, b in zip(found, statistics, strict=True):
                torch.testing.assert_close(a, b[:, t : t + 1], rtol=1e-10, atol=1e-10)
    for part in ("anchor", "weights", "momentum", "offset"):
        torch.testing.assert_close(
            getattr(state, part), getattr(last, part), rtol=1e-10, atol=1e-10
        )


def test_packed_equals_one_by_one():
    lengths = [5, 0, 9, 1]
    inputs, state, boundaries = make(lengths, 2, packed=True, offset=[1, 0, 2, 3])
    together, final = neural_memory(**inputs, state=state, chunk_size=4, cu_seqlens=boundaries)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        alone = NeuralMemoryState(
            *(
                tuple(x[i : i + 1] for x in p)
                for p in (state.anchor, state.weights, state.momentum)
            ),
            state.offset[i : i + 1],
        )
        part = {name: x[:, start:end] for name, x in inputs.items()}
        o, last = neural_memory(**part, state=alone, chunk_size=4)
        torch.testing.assert_close(together[:, start:end], o)
        torch.testing.assert_close(final.weights[1][i : i + 1], last.weights[1])
        assert final.offset[i] == last.offset[0]


def test_linear_memory_by_hand():
    # One head, one channel, one token: everything is a number.
    one = torch.ones(1, 1, 1, 1, dtype=FLOAT64)
    w, s, k, v, q, alpha, eta, theta = 0.5, 0.25, 2.0, 3.0, 1.5, 0.1, 0.8, 0.05
    state = NeuralMemoryState((w * one,), (w * one,), (s * one,), torch.zeros(1, dtype=torch.int64))
    gates = [x * one[..., 0] for x in (alpha, eta, theta)]
    o, final = neural_memory(q * one, k * one, v * one, *gates, state, chunk_size=4)
    momentum = eta * s - theta * 2 * (k * w - v) * k
    weight = (1 - alpha) * w + momentum
    assert o.item() == pytest.approx(weight * q)
    assert final.momentum[0].item() == pytest.approx(momentum)
    assert final.anchor[0].item() == w and final.offset.item() == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_gates_at_their_limits_stay_finite(monkeypatch, depth):
    inputs, state, _ = make([11], depth)
    inputs["alpha"][:, 5] = 1.0  # forget everything
    inputs["eta"][:, 5] = 0.0
    inputs["alpha"][:, 2] = 0.0
    inputs["eta"][:, 2] = 1.0
    inputs["theta"][:, 3] = 0.0
    expected = run(monkeypatch, "reference", inputs, state, 8)
    got = run(monkeypatch, "eager", inputs, state, 8)
    assert all(x.isfinite().all() for x in got.values())
    torch.testing.assert_close(got["o"], expected["o"])
    for name in ("dalpha", "deta"):  # but for those at the limit themselves
        assert not got[name][:, 5].any()
        expected[name][:, 5] = 0
    for name in ("dtheta", "dalpha", "deta"):
        torch.testing.assert_close(got[name], expected[name])


def test_low_precision_inputs_keep_a_float32_state():
    inputs, state, _ = make([9, 9], 2)
    exact, _ = neural_memory(**inputs, state=state, chunk_size=4)
    low = {name: x.bfloat16() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, final = neural_memory(**low, state=state, chunk_size=4)
    assert o.dtype == torch.bfloat16
    assert {w.dtype for w in (*final.anchor, *final.weights, *final.momentum)} == {torch.float32}
    torch.testing.assert_close(o.double(), exact, rtol=0.05, atol=0.05)


def test_without_grad_the_reference_returns_plain_tensors(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    inputs, state, _ = make([3], 2)
    with torch.no_grad():
        o, final = neural_memory(**inputs, state=state, chunk_size=4)
    assert not o.requires_grad and not final.weights[0].requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"read": "chunk_stat"}, "did you mean 'chunk_start'"),
        ({"refresh": 6}, "multiple of the chunk size, 4"),
        ({"refresh": "always"}, "'never'"),
        ({"read": "chunk_start", "refresh": "never"}, "reads the anchor"),
        ({"exact": True, "clip": 1.0}, "no clip"),
        ({"exact": True}, "anchor must be empty"),
        ({"clip": 0.0}, "clip is 0.0"),
    ],
)
def test_options_are_checked(options, message):
    inputs, state, _ = make([3], 1)
    with pytest.raises(ValueError, match=message):
        neural_memory(**inputs | {"state": state, "chunk_size": 4} | options)


def test_exact_is_for_the_linear_memory():
    inputs, state, _ = make([3], 2, exact=True)
    with pytest.raises(ValueError, match="the state has 2 layers"):
        neural_memory(**inputs, state=state, chunk_size=4, exact=True)


def test_gradients_beyond_the_clip_shrink_to_it():
    inputs, state, _ = make([6], 1)
    _, _, free = neural_memory(**inputs, state=state, chunk_size=8, return_statistics=True)
    norms = free.gradient_norm
    bound = float(norms.median())
    scaled = inputs | {"theta": inputs["theta"] * (bound / norms).clamp(max=1)}
    expected, _ = neural_memory(**scaled, state=state, chunk_size=8)
    clipped, _ = neural_memory(**inputs, state=state, chunk_size=8, clip=bound)
    torch.testing.assert_close(clipped, expected)
    surprise = (
        torch.einsum("bthd,bhde->bthe", inputs["k"], state.anchor[0]) - inputs["v"]
    ).square()
    torch.testing.assert_close(free.surprise, surprise.sum(-1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 3, 2, 4)}, "k is"),
        ({"theta": torch.zeros(1, 3, 1)}, "theta is"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ({"state": make([3, 3], 2)[1]}, "the state's weights has layers"),
    ],
)
def test_shapes_are_checked(change, message):
    inputs, state, _ = make([3], 2)
    with pytest.raises(ValueError, match=message):
        neural_memory(**inputs | {"state": state, "chunk_size": 4} | change)
