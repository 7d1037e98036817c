"""Attention against the plain formula, whatever path computes it."""

import itertools

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm import MemLMConfig
from memlm.layers.attention import Attention
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.context import CallContext, SequenceLayout

HIDDEN = 16


def varlen_attention(module, query, key, value, attention_mask, scaling, sliding_window, **kwargs):
    """What flash attention does with cu_seq_lens: packed sequences, aligned at their ends."""
    assert attention_mask is None
    borders_q, borders_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    assert borders_q.dtype == borders_k.dtype == torch.int32
    assert borders_q[-1] == query.shape[2] and borders_k[-1] == key.shape[2]
    assert kwargs["max_length_q"] == int(borders_q.diff().max())
    assert kwargs["max_length_k"] == int(borders_k.diff().max())
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    pieces = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(borders_q.tolist()), itertools.pairwise(borders_k.tolist()), strict=True
    ):
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        distance = place - torch.arange(k1 - k0)
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        scores = query[:, :, q0:q1] @ key[:, :, k0:k1].transpose(2, 3) * scaling
        pieces.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, k0:k1])
    return torch.cat(pieces, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("flash_in_plain_torch", varlen_attention)
# The softmax of transformers' eager attention is in float32.
TOLERANCE = {"sdpa": 1e-10, "flash_in_plain_torch": 1e-10, "eager": 1e-5}


def build(implementation="sdpa", **options):
    torch.manual_seed(1)
    config = MemLMConfig(hidden_size=HIDDEN)
    config._attn_implementation = implementation
    layer = Attention(AttentionConfig(num_heads=2, **options), config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def assert_close(actual, expected, implementation="sdpa"):
    tolerance = TOLERANCE[implementation]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rotate(x, positions, rotary):
    """Rotary positions, pair by pair: channel i of the D that are turned with channel i + D/2."""
    half, stretch = rotary.channels // 2, dict(rotary.scaling).get("factor", 1.0)
    out = x.clone()
    for i in range(half):
        angle = positions / stretch * rotary.theta ** (-2 * i / (2 * half))
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def formula(layer, hidden):
    """One document [T, HIDDEN], query by query."""
    length = hidden.shape[0]
    if layer.convolution is not None:
        weight, reach = layer.convolution.weight[:, 0], layer.convolution.kernel_size - 1
        padded = torch.cat([hidden.new_zeros(reach, HIDDEN), hidden])
        taps = [padded[j : j + length] * weight[:, j] for j in range(reach + 1)]
        hidden = hidden + sum(taps)
    q, k, v = layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)
    if layer.norm_all_heads:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k, v = (x.view(length, -1, layer.head_dim) for x in (q, k, v))
    if not layer.norm_all_heads:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rotary is not None:
        positions = torch.arange(length, dtype=hidden.dtype)
        q, k = (rotate(x, positions, layer.rotary) for x in (q, k))
    rows = []
    for t in range(length):
        first = 0 if layer.window is None else max(0, t + 1 - layer.window)
        heads = []
        for head in range(layer.num_heads):
            shared = head // layer.num_key_value_groups
            scores = k[first : t + 1, shared] @ q[t, head] / layer.head_dim**0.5
            heads.append(scores.softmax(0) @ v[first : t + 1, shared])
        rows.append(torch.cat(heads))
    rows = torch.stack(rows)
    if layer.g_proj is not None:
        rows = rows * layer.g_proj(hidden).sigmoid()
    return layer.o_proj(rows)


def context(valid, starts):
    """A call of rows with padding and document borders."""
    positions = torch.zeros(valid.shape, dtype=torch.int64)
    for row in range(len(valid)):
        count = 0
        for column in range(valid.shape[1]):
            count = 0 if starts[row, column] else count
            positions[row, column] = count
            count += int(valid[row, column])
    return CallContext(SequenceLayout.build(positions, valid, starts), positions)


# Powers of two, which the float32 frequencies of transformers hold exactly.
STRETCHED = {"rope_theta": 16.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
OPTIONS = {
    "full": {},
    "window": {"window": 3},
    "grouped": {"num_key_value_heads": 1},
    "no positions": {"rope": False},
    "query and key norm": {"qk_norm": True},
    "norm of all heads": {"qk_norm": "all_heads", "num_key_value_heads": 1},
    "some channels turned": {"rope_fraction": 0.5},
    "positions stretched": STRETCHED,
    "biases": {"qkv_bias": True, "output_bias": True},
    "gate": {"output_gate": True},
    "convolution": {"conv_size": 3},
    "head size": {"head_dim": 6},
    "everything": {
        "window": 4,
        "num_key_value_heads": 1,
        "qk_norm": True,
        "conv_size": 4,
        "rope_fraction": 0.5,
        **STRETCHED,
        "qkv_bias": True,
        "output_bias": True,
        "output_gate": True,
    },
    "everything, norm of all heads": {
        "num_key_value_heads": 1,
        "qk_norm": "all_heads",
        **STRETCHED,
        "qkv_bias": True,
        "output_gate": True,
    },
}


@pytest.mark.parametrize("implementation", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_formula(implementation, options):
    layer = build(implementation, **options)
    hidden = torch.randn(2, 10, HIDDEN, dtype=torch.float64)
    output, _ = layer(hidden, layer.init_state(2, dtype=torch.float64), CallContext.plain(2, 10))
    for row in range(2):
        assert_close(output[row], formula(layer, hidden[row]), implementation)


@pytest.mark.parametrize("implementation", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_documents_and_padding_stay_apart_over_several_calls(implementation, options):
    layer = build(implementation, **options)
    length = 16
    hidden = torch.randn(3, length, HIDDEN, dtype=torch.float64)
    valid = torch.ones(3, length, dtype=torch.bool)
    starts = torch.zeros(3, length, dtype=torch.bool)
    starts[0, [0, 5, 11]] = True
    valid[1, :6] = False  # left padding longer than a call
    starts[1, 6] = True
    valid[2, [3, 9, 10]] = False  # holes
    starts[2, [0, 12]] = True
    for cuts in ([0, 16], [0, 4, 16], [0, 4, 5, 12, 16], [*range(17)]):
        state = layer.init_state(3, dtype=torch.float64)
        parts = []
        whole = context(valid, starts)
        for start, end in itertools.pairwise(cuts):
            part = slice(start, end)
            layout = SequenceLayout.build(
                whole.position_ids[:, part], valid[:, part], starts[:, part]
            )
            call = CallContext(layout, whole.position_ids[:, part])
            output, state = layer(hidden[:, part], state, call)
            parts.append(output)
        output = torch.cat(parts, 1)
        for row in range(3):
            document = starts[row].cumsum(0)
            for number in range(1, int(document.max()) + 1):
                tokens = valid[row] & (document == number)
                expected = formula(layer, hidden[row, tokens])
                assert_close(output[row, tokens], expected, implementation)


def test_banded_path_is_taken_and_equals_the_masked_one(monkeypatch):
    layer = build(window=4)
    hidden = torch.randn(2, 23, HIDDEN, dtype=torch.float64)
    calls = []
    banded = Attention._banded
    monkeypatch.setattr(
        Attention, "_banded", lambda *args: calls.append(1) or banded(*args), raising=True
    )
    start = layer.init_state(2, dtype=torch.float64)
    _, state = layer(hidden[:, :3], start, CallContext.plain(2, 3))
    assert not calls
    output, after = layer(hidden[:, 3:], state, CallContext.plain(2, 20, 3))
    assert calls
    layout = CallContext.plain(2, 20, 3).layout
    monkeypatch.setattr(Attention, "_banded", lambda self, *args: self._masked(*args, layout))
    expected, after_masked = layer(hidden[:, 3:], state, CallContext.plain(2, 20, 3))
    assert_close(output, expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(after.tensors().values(), after_masked.tensors().values(), strict=True)
    )


def test_window_bounds_the_state():
    layer = build(window=4, conv_size=3)
    state = layer.init_state(1, dtype=torch.float64)
    sizes = []
    for call in range(3):
        hidden = torch.randn(1, 7, HIDDEN, dtype=torch.float64)
        _, state = layer(hidden, state, CallContext.plain(1, 7, 7 * call))
        sizes.append((state.keys.shape[1], state.nbytes))
    assert sizes == [(3, sizes[0][1])] * 3


def test_empty_state_has_no_keys():
    state = build().init_state(3, dtype=torch.float64)
    assert state.batch_size == 3 and state.keys.shape[1] == 0 and state.nbytes == 0


def test_flops_counts_projections_and_visible_pairs():
    layer = build(window=2)
    projections = 4 * HIDDEN * HIDDEN
    pairs = 1 + 2 + 2
    assert layer.flops(3) == 2 * 3 * projections + 4 * pairs * HIDDEN
    assert build().flops(3) == 2 * 3 * projections + 4 * 6 * HIDDEN
    # One more matrix and a product for the gate, and four additions for each token and channel.
    gated = build(window=2, output_gate=True, qkv_bias=True)
    extra = 2 * HIDDEN * HIDDEN + HIDDEN + 4 * HIDDEN
    assert gated.flops(3) - layer.flops(3) == 3 * extra


@pytest.mark.parametrize("length", [2, 9])
def test_narrower_window_on_a_state_of_a_wider_one(length):
    wide = build(window=8)
    hidden = torch.randn(2, 10 + length, HIDDEN, dtype=torch.float64)
    start = wide.init_state(2, dtype=torch.float64)
    _, state = wide(hidden[:, :10], start, CallContext.plain(2, 10))
    wide.window = 3
    output, after = wide(hidden[:, 10:], state, CallContext.plain(2, length, 10))
    assert after.keys.shape[1] == 2
    for row in range(2):
        assert_close(output[row], formula(wide, hidden[row])[10:])
