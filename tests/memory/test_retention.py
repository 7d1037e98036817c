import math

import pytest
import torch
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import Retention, RetentionConfig, memory_config

SMALL = {"num_heads": 2, "head_dim": 6, "expand_v": 1.5}


def build(hidden_size=16, norm_eps=1e-6, **options):
    """A module in float64 whose linear layers are large enough to matter."""
    module = Retention(RetentionConfig(**SMALL | options), hidden_size, norm_eps).double()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.normal_(module.o_norm.weight)
    return module


def call(module, hidden, state=None, first_position=0, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    context = CallContext.plain(*hidden.shape[:2], first_position=first_position, **context)
    return module(hidden, state, context)


@pytest.mark.parametrize(
    "options, decays",
    [
        ({}, [1 - 2**-5, 1 - 2**-6]),
        ({"first_exponent": 1.0, "last_exponent": 9.0, "rope_theta": 50.0}, [1 / 2, 1 - 2**-9]),
    ],
)
def test_the_layer_is_the_published_formula(options, decays):
    """The paper's recurrent form, with the rotation e^(i n theta) as complex numbers."""
    module = build(**options)
    x = torch.randn(9, 16, dtype=torch.float64)
    w = dict(module.named_parameters())
    H, K, V = 2, 6, 9
    q, k, v = (x @ w[f"{name}_proj.weight"].t() for name in "qkv")
    q, k = (torch.complex(*part.view(9, H, 2, K // 2).unbind(2)) for part in (q, k))
    theta = options.get("rope_theta", 10000.0)
    angles = torch.tensor([theta ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    outputs = torch.zeros(9, H, V, dtype=torch.float64)
    for head in range(H):
        S = torch.zeros(K // 2, V, dtype=torch.complex128)
        for n in range(9):
            turn = torch.polar(torch.ones_like(angles), n * angles)
            S = decays[head] * S + torch.outer(
                (k[n, head] * turn).conj(), v.view(9, H, V)[n, head].to(S.dtype)
            )
            outputs[n, head] = ((q[n, head] * turn) @ S).real / math.sqrt(K)
    outputs = F.rms_norm(outputs, (V,), w["o_norm.weight"], eps=1e-6).flatten(1)
    expected = (outputs * F.silu(x @ w["g_proj.weight"].t())) @ w["o_proj.weight"].t()
    torch.testing.assert_close(call(module, x[None])[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, hidden_size, sizes",
    [
        ({}, 16, (1, 16, 32)),
        ({}, 128, (4, 32, 64)),
        ({}, 1024, (4, 256, 512)),
        ({"num_heads": 8}, 1024, (8, 128, 256)),
        ({"num_heads": 3, "head_dim": 10, "expand_v": 1}, 64, (3, 10, 10)),
    ],
)
def test_sizes_follow_the_hidden_size(options, hidden_size, sizes):
    config = memory_config({"type": "retention", **options})
    assert config.sizes(hidden_size) == sizes
    assert Retention(config, hidden_size).init_state(3).recurrent.shape == (3, *sizes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"num_heads": 3}, "hidden_size 64 is not a multiple of num_heads 3"),
        ({"head_dim": 5}, "even head_dim, got 5"),
        ({"head_dim": 6, "expand_v": 1.4}, "not a whole number"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"first_exponent": 0.0}, "0 < first_exponent <= last_exponent"),
        ({"first_exponent": 5.0, "last_exponent": 4.0}, "0 < first_exponent <= last_exponent"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        Retention(RetentionConfig(**options), 64)


def test_slow_decays_keep_their_digits():
    module = Retention(RetentionConfig(num_heads=16, head_dim=2, last_exponent=30.0), 32)
    log_decay = module.log_decay(torch.zeros(1, dtype=torch.bfloat16))
    assert log_decay.dtype == torch.float32
    assert log_decay[0] == pytest.approx(math.log(1 - 2**-5))
    assert log_decay[-1] == pytest.approx(-(2.0**-30))


def test_positions_are_those_within_the_document():
    """Attention to an earlier token depends on the distance, not on where the pair stands."""
    module = build()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    near, _ = call(module, x)
    far, _ = call(module, x, module.init_state(1, dtype=x.dtype), first_position=5000)
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-8)
    layout = CallContext.plain(1, 7)
    stuck = CallContext(layout.layout, torch.zeros_like(layout.position_ids))
    still, _ = module(x, module.init_state(1, dtype=x.dtype), stuck)
    assert (still - near).abs().max() > 1e-3


def test_without_writing_tokens_read_the_given_state_as_it_is():
    module = build(norm_eps=10.0)  # or the norm would hide a state that fades
    _, state = call(module, torch.randn(1, 7, 16, dtype=torch.float64))
    tokens = torch.randn(1, 5, 16, dtype=torch.float64)
    together, after = call(module, tokens, state, first_position=7, write=False)
    assert after is state
    for t in range(5):
        alone, _ = call(module, tokens[:, t : t + 1], state, first_position=7 + t, write=False)
        torch.testing.assert_close(together[:, t : t + 1], alone)
    assert together.abs().max() > 0
    empty, _ = call(module, tokens, write=False)
    assert torch.equal(empty, torch.zeros_like(empty))


def test_the_state_stays_float32_in_a_bfloat16_module():
    module = Retention(RetentionConfig(**SMALL), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    output, after = call(module, torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert (output.dtype, after.recurrent.dtype) == (torch.bfloat16, torch.float32)
    assert after.nbytes == state.nbytes


def test_flops_are_linear_in_tokens_and_cover_projections_and_state():
    module = build()
    matrices = sum(
        layer.weight.numel() for layer in module.modules() if hasattr(layer, "in_features")
    )
    assert module.flops(200) == 2 * module.flops(100) == 200 * (2 * matrices + 5 * 2 * 6 * 9)
