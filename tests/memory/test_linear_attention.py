import pytest
import torch
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import LinearAttention, LinearAttentionConfig, memory_config
from memlm.specification import build_config

SMALL = {"num_heads": 2, "head_dim": 5}
FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


def build(hidden_size=16, **options):
    """A module in float64 whose linear layers are large enough to matter."""
    module = LinearAttention(LinearAttentionConfig(**SMALL | options), hidden_size).double()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    return module


def call(module, hidden, state=None, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    context["first_position"] = 0 if state is None else 9
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    return module(hidden, state, CallContext.plain(*hidden.shape[:2], **context))


@pytest.mark.parametrize(
    "feature_map, normalizer, output_norm",
    [
        ("elu", True, False),
        ("elu", True, True),
        ("elu", False, True),
        ("relu", True, True),
        ("identity", False, True),
    ],
)
def test_the_layer_is_the_published_formula(feature_map, normalizer, output_norm):
    """The paper's recurrent form: sums s of phi(k) v^T and z of phi(k)."""
    module = build(feature_map=feature_map, normalizer=normalizer, output_norm=output_norm)
    if output_norm:
        torch.nn.init.normal_(module.o_norm.weight)
    x = torch.randn(9, 16, dtype=torch.float64)
    w = dict(module.named_parameters())
    H, D = 2, 5
    q, k, v = ((x @ w[f"{name}_proj.weight"].t()).view(9, H, D) for name in "qkv")
    q, k = (FEATURES[feature_map](part) for part in (q, k))
    outputs = torch.zeros(9, H, D, dtype=torch.float64)
    for head in range(H):
        s, z = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        for t in range(9):
            s = s + torch.outer(k[t, head], v[t, head])
            z = z + k[t, head]
            outputs[t, head] = q[t, head] @ s
            if normalizer:
                outputs[t, head] /= q[t, head] @ z + 1e-6
    outputs = outputs.flatten(1)
    if output_norm:
        outputs = F.rms_norm(outputs, (H * D,), w["o_norm.weight"], eps=1e-6)
    expected = outputs @ w["o_proj.weight"].t()
    torch.testing.assert_close(call(module, x[None])[0][0], expected, rtol=1e-9, atol=1e-9)


def test_a_read_is_an_average_of_the_values():
    module = build(output_norm=False)
    torch.nn.init.eye_(module.o_proj.weight)
    hidden = torch.randn(1, 1, 16, dtype=torch.float64)
    output, _ = call(module, hidden.expand(1, 50, 16))
    value = module.o_proj(module.v_proj(hidden))
    torch.testing.assert_close(output, value.expand_as(output), rtol=1e-4, atol=1e-4)


def test_small_features_keep_their_digits():
    module = LinearAttention(LinearAttentionConfig(num_heads=1, head_dim=1), 1)
    for layer in (module.q_proj, module.k_proj, module.v_proj):
        torch.nn.init.ones_(layer.weight)
    _, state = call(module, torch.full((1, 1, 1), -20.0))
    assert state.recurrent[0, 0, 0, 1].item() == pytest.approx(2.0611536e-09, rel=1e-5)


@pytest.mark.parametrize(
    "options, hidden_size, sizes",
    [
        ({}, 32, (1, 32)),
        ({}, 1024, (16, 64)),
        ({"num_heads": 2}, 64, (2, 32)),
        ({"num_heads": 3, "head_dim": 7}, 64, (3, 7)),
    ],
)
def test_sizes_follow_the_hidden_size(options, hidden_size, sizes):
    config = memory_config({"type": "linear_attention", **options})
    assert config.sizes(hidden_size) == sizes
    heads, width = sizes
    state = LinearAttention(config, hidden_size).init_state(3)
    assert state.recurrent.shape == (3, heads, width, width + 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"num_heads": 3}, "hidden_size 64 is not a multiple of num_heads 3"),
        ({"num_heads": 65, "head_dim": None}, "hidden_size 64 is not a multiple of num_heads 65"),
        ({"feature_map": "identity"}, "set normalizer: false"),
        ({"normalizer": False, "output_norm": False}, "set one of them to true"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        LinearAttention(LinearAttentionConfig(**options), 64)


def test_an_unknown_feature_map_is_refused():
    with pytest.raises(UserError, match="feature_map"):
        build_config(LinearAttention.config_class, {"feature_map": "gelu"}, "layers.0.mixer")


@pytest.mark.parametrize("options", [{}, {"feature_map": "identity", "normalizer": False}])
def test_without_writing_tokens_read_the_given_state_as_it_is(options):
    module = build(**options)
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
    module = LinearAttention(LinearAttentionConfig(**SMALL), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    output, after = call(module, torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert (output.dtype, after.recurrent.dtype) == (torch.bfloat16, torch.float32)
    assert after.nbytes == state.nbytes


def test_flops_are_linear_in_tokens_and_cover_projections_and_state():
    module = build()
    matrices = sum(
        layer.weight.numel() for layer in module.modules() if hasattr(layer, "in_features")
    )
    assert module.flops(200) == 2 * module.flops(100) == 200 * (2 * matrices + 4 * 2 * 5 * 6)
