import math

import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import memory_config
from memlm.memory.gated_delta import GatedDelta, GatedDeltaConfig
from memlm.training.optimizer import build_optimizers
from tests.memory.law_tools import build_model, run

SMALL = {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "expand_v": 1.5}


def build(hidden_size=16, **options):
    """A module in float64 whose linear layers are large enough to matter."""
    module = GatedDelta(GatedDeltaConfig(**SMALL | options), hidden_size).double()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    return module


def call(module, hidden, state=None, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    context["first_position"] = 0 if state is None else 9
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    return module(hidden, state, CallContext.plain(*hidden.shape[:2], **context))


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("conv_size", [4, 1, None])
@pytest.mark.parametrize("use_gate", [True, False])
@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_the_layer_is_the_published_formula(use_gate, allow_neg_eigval, conv_size, decay):
    assert_is_the_formula(
        use_gate=use_gate, allow_neg_eigval=allow_neg_eigval, conv_size=conv_size, decay=decay
    )


@pytest.mark.parametrize(
    "options", [{"conv_bias": True}, {"gate_activation": "sigmoid"}, {"norm_eps": 0.1}]
)
def test_what_other_libraries_choose(options):
    assert_is_the_formula(**options)


def assert_is_the_formula(
    use_gate=True,
    allow_neg_eigval=False,
    conv_size=4,
    decay=True,
    conv_bias=False,
    gate_activation="silu",
    norm_eps=None,
):
    module = build(
        use_gate=use_gate,
        allow_neg_eigval=allow_neg_eigval,
        conv_size=conv_size,
        decay=decay,
        beta_bias=-0.5,
        conv_bias=conv_bias,
        gate_activation=gate_activation,
        norm_eps=norm_eps,
    )
    if conv_bias:
        assert (module.conv1d.bias == 0).all()
        torch.nn.init.normal_(module.conv1d.bias)
    x = torch.randn(9, 16, dtype=torch.float64)
    w = dict(module.named_parameters())
    H, HV, K, V = 2, 4, 4, 6
    qkv = torch.cat([x @ w[f"{name}_proj.weight"].t() for name in "qkv"], -1)
    if conv_size is not None:
        padded = F.pad(qkv, (0, 0, conv_size - 1, 0))
        kernel = w["conv1d.weight"][:, 0]
        qkv = sum(padded[j : j + 9] * kernel[:, j] for j in range(conv_size))
        qkv = qkv + w.get("conv1d.bias", 0)
    q, k, v = F.silu(qkv).split((H * K, H * K, HV * V), -1)
    unit = [part.view(9, H, K) for part in (q, k)]
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in unit)
    beta = (x @ w["b_proj.weight"].t() - 0.5).sigmoid() * (2 if allow_neg_eigval else 1)
    log_decay = torch.zeros(9, HV, dtype=torch.float64)
    if decay:
        log_decay = F.softplus(x @ w["a_proj.weight"].t() + w["dt_bias"]) * -w["A_log"].exp()
    outputs = torch.zeros(9, HV, V, dtype=torch.float64)
    for head in range(HV):
        S = torch.zeros(K, V, dtype=torch.float64)
        for t in range(9):
            key = k[t, head // 2]
            S = log_decay[t, head].exp() * S
            S = S + beta[t, head] * torch.outer(key, v.view(9, HV, V)[t, head] - key @ S)
            outputs[t, head] = K**-0.5 * q[t, head // 2] @ S
    outputs = F.rms_norm(outputs, (V,), eps=norm_eps or 1e-6).flatten(1)
    if use_gate:
        gate = {"silu": F.silu, "sigmoid": F.sigmoid}[gate_activation]
        outputs = outputs * gate(x @ w["g_proj.weight"].t())
    expected = outputs @ w["o_proj.weight"].t()
    torch.testing.assert_close(call(module, x[None])[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, hidden_size, sizes",
    [
        ({}, 128, (3, 3, 32, 64)),
        ({}, 1024, (6, 6, 128, 256)),
        ({"num_heads": 4}, 1024, (4, 4, 192, 384)),
        ({"num_heads": 2, "head_dim": 32}, 128, (2, 2, 32, 64)),
        ({"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1}, 64, (2, 4, 8, 8)),
        ({"num_heads": 1, "head_dim": 49, "expand_v": 1 / 49}, 64, (1, 1, 49, 1)),
        ({"num_heads": 1, "head_dim": 24, "expand_v": 16 / 24}, 64, (1, 1, 24, 16)),
    ],
)
def test_sizes_follow_the_hidden_size(options, hidden_size, sizes):
    config = memory_config({"type": "gated_delta", **options})
    assert config.sizes(hidden_size) == sizes
    state = GatedDelta(config, hidden_size).init_state(3)
    assert state.recurrent.shape == (3, *sizes[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2, "num_v_heads": 3}, "not a multiple of num_heads 2"),
        ({"head_dim": 5, "expand_v": 1.5}, "not a whole number"),
        ({"conv_size": 0}, "conv_size is 0, it must be at least 1, or null for no convolution"),
        ({"conv_size": None, "conv_bias": True}, "conv_bias needs a convolution"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0, it must be at least 0"),
        ({"dt_min": 0.5, "dt_max": 0.1}, "0 < dt_min <= dt_max"),
        ({"A_min": 0.0}, "0 < A_min <= A_max"),
        ({"A_max": math.inf}, "A_max inf must satisfy 0 < A_min <= A_max and be finite"),
        ({"beta_bias": math.nan}, "beta_bias is nan, it must be finite"),
        ({"expand_v": math.inf}, "expand_v is inf, it must be positive and finite"),
        ({"expand_v": 1e-9}, "not a whole number"),
        ({"use_gate": False, "gate_activation": "sigmoid"}, "gate_activation needs a gate"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        GatedDelta(GatedDeltaConfig(**options), 64)


def test_start_values_lie_in_their_ranges():
    wide = GatedDelta(GatedDeltaConfig(num_heads=64, head_dim=2), 64)
    dt, rate = F.softplus(wide.dt_bias), wide.A_log.exp()
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and dt.max() > 5 * dt.min()
    assert rate.min() >= 0.0099 and rate.max() <= 16.01 and rate.std() > 1
    assert wide.b_proj.bias is None
    fixed = GatedDelta(
        GatedDeltaConfig(dt_min=1e-3, dt_max=1e-3, A_min=1.0, A_max=1.0, beta_bias=-2.0), 64
    )
    torch.testing.assert_close(F.softplus(fixed.dt_bias), torch.full_like(fixed.dt_bias, 1e-3))
    torch.testing.assert_close(fixed.A_log, torch.zeros_like(fixed.A_log))
    assert (fixed.b_proj.bias == -2).all()


def test_without_writing_tokens_read_the_given_state_as_it_is():
    module = build(conv_size=None)
    _, state = call(module, torch.randn(1, 7, 16, dtype=torch.float64))
    tokens = torch.randn(1, 5, 16, dtype=torch.float64)
    together, after = call(module, tokens, state, write=False)
    assert after is state
    for t in range(5):
        torch.testing.assert_close(
            together[:, t : t + 1], call(module, tokens[:, t : t + 1], state, write=False)[0]
        )
    assert together.abs().max() > 0
    empty, _ = call(module, tokens, write=False)
    assert torch.equal(empty, torch.zeros_like(empty))


def test_the_state_stays_float32_in_a_bfloat16_module():
    module = GatedDelta(GatedDeltaConfig(**SMALL), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    hidden = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    output, after = call(module, hidden, state)
    assert output.dtype == torch.bfloat16
    assert (after.conv.dtype, after.recurrent.dtype) == (torch.bfloat16, torch.float32)
    assert after.nbytes == state.nbytes


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_casts_leave_the_decay_in_float32(narrow):
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=[{"mixer": "gated_delta"}]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.model.layers[0].mixer.module.A_log.grad = torch.ones(1)
    for name, parameter in model.to(narrow).named_parameters():
        kept = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if kept else narrow)
        assert torch.equal(parameter, before[name].to(parameter.dtype))
    module = model.model.layers[0].mixer.module
    assert module.A_log.grad.dtype == torch.float32
    assert module.double().A_log.dtype == module.q_proj.weight.dtype == torch.float64
    assert module.to(narrow).A_log.dtype == torch.float32


def test_decay_has_no_weight_decay():
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=[{"mixer": "gated_delta"}]))
    (optimizer,) = build_optimizers(model, TrainConfig(optimizer="adamw", weight_decay=0.1))
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    module = model.model.layers[0].mixer.module
    assert decays[id(module.A_log)] == decays[id(module.dt_bias)] == 0
    assert decays[id(module.a_proj.weight)] == 0.1


LIKE_QWEN3_NEXT = {
    "num_key_value_heads": 1,
    "qk_norm": True,
    "rope_fraction": 0.25,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "qkv_bias": True,
    "output_gate": True,
}


@pytest.mark.parametrize(
    ("delta", "attending"),
    [
        ({}, {}),
        ({"conv_bias": True, "gate_activation": "sigmoid", "norm_eps": 1e-3}, LIKE_QWEN3_NEXT),
    ],
    ids=["plain", "options"],
)
@torch.no_grad()
def test_layers_of_attention_and_gated_delta_mix_in_any_split(delta, attending):
    recurrent = {"repeat": 2, "mixer": {"type": "gated_delta", **SMALL, **delta}, "ffn": "swiglu"}
    attention = {"mixer": {"type": "attention", "num_heads": 2, **attending}, "ffn": "swiglu"}
    model = build_model([recurrent, attention, {**recurrent, "repeat": 1}])
    ids = torch.randint(1, 40, (2, 17))
    whole, states = run(model, ids)
    assert sorted(model.memory_state_names()) == ["0.mixer", "1.mixer", "3.mixer"]
    assert len(states) == 5  # the positions and the four mixers
    first, states = run(model, ids[:, :6])
    rest, _ = run(model, ids[:, 6:], states)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-9, atol=1e-9)


def test_flops_are_linear_in_tokens_and_cover_the_projections():
    module = build()
    matrices = sum(
        layer.weight.numel() for layer in module.modules() if hasattr(layer, "in_features")
    )
    assert module.flops(200) == 2 * module.flops(100) > 200 * matrices
