"""minGRU and minLSTM: the published formulas, their sizes and their start."""

import math

import pytest
import torch
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import MinGRU, MinGRUConfig, MinLSTM, MinLSTMConfig, memory_config

FLOAT64 = torch.float64
MEMORIES = {"min_gru": (MinGRU, MinGRUConfig), "min_lstm": (MinLSTM, MinLSTMConfig)}
both = pytest.mark.parametrize("name", MEMORIES)


def build(name, hidden_size=6, **options):
    """A module in float64 whose every parameter is large enough to matter."""
    cls, config = MEMORIES[name]
    module = cls(config(**options), hidden_size).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def call(module, hidden, state=None, first_position=0, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    context = CallContext.plain(*hidden.shape[:2], first_position=first_position, **context)
    return module(hidden, state, context)


@both
@pytest.mark.parametrize("conv_size", [None, 3])
def test_the_layer_is_the_published_formula(name, conv_size):
    module = build(name, expansion=1.5, conv_size=conv_size)
    x = torch.randn(9, 6, dtype=FLOAT64)
    inputs = x
    w = dict(module.named_parameters())
    if conv_size:
        taps = w["conv1d.weight"][:, 0]
        seen = F.pad(x, (0, 0, 2, 0))
        inputs = torch.stack([(taps.t() * seen[t : t + 3]).sum(0) for t in range(9)])
    h, outputs = torch.zeros(9, dtype=FLOAT64), []
    for x_t in inputs:
        v = w["h_proj.weight"] @ x_t
        candidate = [e + 0.5 if e >= 0 else 1 / (1 + math.exp(-e)) for e in v.tolist()]
        candidate = torch.tensor(candidate, dtype=FLOAT64)
        if name == "min_gru":
            z = torch.sigmoid(w["z_proj.weight"] @ x_t + w["z_proj.bias"])
            h = (1 - z) * h + z * candidate
        else:
            f = torch.sigmoid(w["f_proj.weight"] @ x_t + w["f_proj.bias"])
            i = torch.sigmoid(w["i_proj.weight"] @ x_t + w["i_proj.bias"])
            h = f / (f + i) * h + i / (f + i) * candidate
        outputs.append(w["o_proj.weight"] @ h)
    output, state = call(module, x[None])
    torch.testing.assert_close(output[0], torch.stack(outputs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.recurrent[0], h, rtol=1e-9, atol=1e-9)


@both
def test_the_carried_state_is_taken_as_it_is(name):
    """Not g or its logarithm of it: two calls are one, from a state of any sign."""
    module = build(name)
    x = torch.randn(2, 12, 6, dtype=FLOAT64)
    state = module.init_state(2, dtype=FLOAT64)
    state.recurrent.normal_()
    assert (state.recurrent < 0).any()
    whole, last = call(module, x, state, first_position=3)
    first, state = call(module, x[:, :5], state, first_position=3)
    second, state = call(module, x[:, 5:], state, first_position=8)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(state.recurrent, last.recurrent)
    assert torch.equal(state.conv, last.conv)


@both
def test_shares_sum_to_one_however_strong_the_gates(name):
    module = build(name, conv_size=None).float()
    for scale in (1.0, 1e3, 1e5):
        x = scale * torch.randn(1, 50, 6)
        x.requires_grad_()
        keep, take = module.keep_and_take(x)
        torch.testing.assert_close(keep + take, torch.ones_like(keep))
        assert torch.autograd.grad(keep.sum() + 2 * take.sum(), x)[0].isfinite().all()


@both
def test_slow_channels_keep_their_digits(name):
    """A share of 1 - e^-12 to keep is 1 in bfloat16, and then nothing would ever fade."""
    module = build(name, conv_size=None).bfloat16()
    for gate in module.gates:
        torch.nn.init.zeros_(getattr(module, gate).weight)
        torch.nn.init.zeros_(getattr(module, gate).bias)
    slow = "z_proj" if name == "min_gru" else "i_proj"
    torch.nn.init.constant_(getattr(module, slow).bias, -12.0)
    keep, _ = module.keep_and_take(torch.randn(1, 3, 6, dtype=torch.bfloat16))
    half, closed = 0.5, 1 / (1 + math.exp(12))
    expected = 1 - closed if name == "min_gru" else half / (half + closed)
    assert keep.dtype == torch.float32
    torch.testing.assert_close(keep, torch.full_like(keep, expected), rtol=1e-7, atol=0)


@both
def test_the_state_stays_float32_in_a_bfloat16_module(name):
    module = MEMORIES[name][0](MEMORIES[name][1](), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    output, after = call(module, torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert (output.dtype, after.recurrent.dtype) == (torch.bfloat16, torch.float32)
    assert after.conv.dtype == torch.bfloat16
    assert after.nbytes == state.nbytes


@both
def test_without_writing_tokens_read_the_given_state_as_it_is(name):
    module = build(name)
    _, state = call(module, torch.randn(1, 7, 6, dtype=FLOAT64))
    output, after = call(
        module, torch.randn(1, 5, 6, dtype=FLOAT64), state, first_position=7, write=False
    )
    assert after is state
    expected = state.recurrent @ module.o_proj.weight.t()
    torch.testing.assert_close(output, expected[:, None].expand(-1, 5, -1))
    empty, _ = call(module, torch.randn(1, 5, 6, dtype=FLOAT64), write=False)
    assert torch.equal(empty, torch.zeros_like(empty))


@pytest.mark.parametrize(
    "name, option, gate",
    [("min_gru", "update_bias", "z_proj"), ("min_lstm", "forget_bias", "f_proj")],
)
def test_start_values_of_the_gate(name, option, gate):
    cls, config = MEMORIES[name]
    module = cls(config(**{option: -2.5}), 8)
    assert getattr(module, gate).bias.unique().tolist() == [-2.5]


@both
@pytest.mark.parametrize(
    "options, width", [({}, 32), ({"expansion": 1.0}, 16), ({"expansion": 0.5}, 8)]
)
def test_sizes_follow_the_hidden_size(name, options, width):
    config = memory_config({"type": name, **options})
    state = MEMORIES[name][0](config, 16).init_state(3)
    assert state.recurrent.shape == (3, width)
    assert state.conv.shape == (3, 3, 16)
    alone = memory_config({"type": name, "conv_size": None})
    assert MEMORIES[name][0](alone, 16).init_state(3).conv.shape == (3, 0, 16)


@both
@pytest.mark.parametrize(
    "options, message",
    [
        ({"expansion": 0.0}, "expansion 0.0 times hidden_size 64"),
        ({"expansion": -1.0}, "expansion -1.0 times hidden_size 64"),
        ({"expansion": 1.01}, "a whole number of channels"),
        ({"conv_size": 0}, "conv_size is 0"),
    ],
)
def test_impossible_sizes(name, options, message):
    cls, config = MEMORIES[name]
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        cls(config(**options), 64)


@both
def test_flops_are_linear_in_tokens_and_cover_projections_and_state(name):
    module = build(name, hidden_size=16)
    matrices = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    assert module.flops(200) == 2 * module.flops(100) == 200 * (2 * matrices + 3 * 32)
