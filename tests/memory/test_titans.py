import dataclasses

import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import memory_config
from memlm.memory.titans import Titans, TitansConfig

SMALL = {"num_heads": 2, "head_dim": 4, "expansion": 2, "chunk_size": 4}
FLOAT64 = torch.float64


def build(hidden_size=16, **options):
    """A module in float64 whose linear layers are large enough to matter."""
    module = Titans(TitansConfig(**SMALL | options), hidden_size).double()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    return module


def call(module, hidden, state=None, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    context["first_position"] = 0 if state is None else 9
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    return module(hidden, state, CallContext.plain(*hidden.shape[:2], **context))


@pytest.mark.parametrize("average", [True, False])
def test_the_layer_is_the_published_formula(average):
    # Depth 1 with a chunk of one token: the gradient has the simple form 2 k (k W - v).
    module = build(depth=1, chunk_size=1, average_momentum=average, theta_max=0.3)
    with torch.no_grad():
        module.memory.initial_weights[0].normal_()
    x = torch.randn(6, 16, dtype=FLOAT64)
    w = dict(module.named_parameters())
    qkv = torch.cat([x @ w[f"memory.{name}_proj.weight"].t() for name in "qkv"], -1)
    padded = F.pad(qkv, (0, 0, 3, 0))
    qkv = F.silu(sum(padded[j : j + 6] * w["memory.conv1d.weight"][:, 0, j] for j in range(4)))
    q, k, v = (part.view(6, 2, 4) for part in qkv.chunk(3, -1))
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    gates = (x @ w["memory.gates_proj.weight"].t() + w["memory.gates_bias"]).sigmoid()
    alpha, eta, theta = gates.chunk(3, -1)
    theta = 0.3 * theta * ((1 - eta) if average else 1)
    outputs = torch.zeros(6, 2, 4, dtype=FLOAT64)
    for head in range(2):
        W, S = w["memory.initial_weights.0"][head], torch.zeros(4, 4, dtype=FLOAT64)
        for t in range(6):
            gradient = 2 * torch.outer(k[t, head], k[t, head] @ W - v[t, head])
            S = eta[t, head] * S - theta[t, head] * gradient
            W = (1 - alpha[t, head]) * W + S
            outputs[t, head] = q[t, head] @ W
    outputs = F.rms_norm(outputs, (4,), eps=1e-6).flatten(1)
    expected = (outputs * F.silu(x @ w["g_proj.weight"].t())) @ w["o_proj.weight"].t()
    torch.testing.assert_close(call(module, x[None])[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, hidden_size, sizes",
    [
        ({}, 128, (4, 32)),
        ({}, 1024, (16, 64)),
        ({"num_heads": 2}, 128, (2, 64)),
        ({"head_dim": 16}, 128, (8, 16)),
    ],
)
def test_sizes_follow_the_hidden_size(options, hidden_size, sizes):
    config = memory_config({"type": "titans", **options})
    assert config.sizes(hidden_size) == sizes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "lm"}, "did you mean 'lmm'"),
        ({"depth": 5}, "depth is 5, it must be 1 to 4"),
        ({"persistent_tokens": -1}, "persistent_tokens is -1"),
        ({"refresh": 24}, "refresh is 24, it must be chunk, never or a multiple of chunk_size"),
        ({"refresh": "often"}, "refresh is 'often'"),
        ({"read": "chunk_start", "refresh": "never"}, "it needs refresh: chunk"),
        ({"exact": True}, "exact is for depth 1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"variant": "mag", "attention_heads": 5}, "attention of mag: hidden_size 64"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"theta_max": 0.0}, "theta_max is 0.0"),
        ({"theta_max": float("nan")}, "theta_max is nan, it must be positive and finite"),
        ({"persistent_tokens": 32}, "persistent_tokens is for attention"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        Titans(TitansConfig(**options), 64)


def test_start_values_survive_the_initialisation_of_a_model():
    model = MemLMForCausalLM(
        MemLMConfig(vocab_size=8, hidden_size=64, layers=[{"repeat": 1, "mixer": "titans"}])
    )
    (module,) = (module for module in model.modules() if isinstance(module, Titans))
    torch.testing.assert_close(
        module.memory.gates_bias, torch.tensor([-9.0, 2.0, 0.0]).repeat_interleave(2)
    )
    assert module.memory.initial_weights[0].std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "mixer, memory, message",
    [
        (
            {"type": "sliding_attention", "window": 8},
            {"type": "titans", "read": "chunk_start", "chunk_size": 16},
            "segment \\(16\\) is longer than the attention window \\(8\\)",
        ),
        (
            {"type": "titans", "variant": "mac", "segment": 16},
            {"type": "lact", "chunk_size": 64},
            "segment \\(64\\) is longer than the attention window \\(16\\)",
        ),
        ({"type": "titans"}, {"type": "lact", "chunk_size": 2048}, None),
    ],
)
def test_attention_reaches_as_far_as_a_memory_beside_it_is_late(mixer, memory, message):
    layers = [{"mixer": mixer, "memory": memory}]
    if message is None:
        MemLMConfig(hidden_size=64, layers=layers)
        return
    with pytest.raises(UserError, match=message):
        MemLMConfig(hidden_size=64, layers=layers)


@pytest.mark.parametrize("options", [{}, {"read": "chunk_start"}, {"refresh": 8}, {"depth": 1}])
def test_without_writing_a_token_reads_the_same_again_and_again(options):
    module = build(conv_size=None, **options)
    hidden = torch.randn(1, 6, 16, dtype=FLOAT64)
    _, state = call(module, hidden)
    again, after = call(module, hidden[:, :1].expand(1, 9, 16), state, write=False)
    assert after is state
    torch.testing.assert_close(again, again[:, :1].expand_as(again))


def test_start_values():
    module = Titans(TitansConfig(num_heads=2, head_dim=32), 64)
    alpha, eta, theta = module.memory._gates(torch.zeros(1, 1, 64))
    torch.testing.assert_close(alpha, torch.full((1, 1, 2), -9.0).sigmoid())
    torch.testing.assert_close(eta, torch.full((1, 1, 2), 2.0).sigmoid())
    torch.testing.assert_close(theta, 0.05 * (1 - eta))
    assert module.memory.initial_weights[0].std().item() == pytest.approx(1, rel=0.1)
    assert module.memory.initial_weights[1].std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert TitansConfig(chunk_size=64).step_bound == pytest.approx(0.025)
    assert TitansConfig(chunk_size=64, theta_max=0.5).step_bound == 0.5


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_untrained_defaults_stay_stable_on_repeated_tokens(depth, chunk_size):
    module = Titans(TitansConfig(num_heads=2, depth=depth, chunk_size=chunk_size), 64)
    one, other = torch.randn(2, 1, 1, 64)
    hidden = torch.cat(
        [one.expand(1, 512, 64), torch.randn(1, 512, 64), other.repeat(1, 512, 1)], 1
    )
    with torch.no_grad():
        output, state = call(module, hidden)
    assert output.isfinite().all()
    # Behind a layer norm gradients are orthogonal to the weights: these grow with every step, by
    # less and less, as long as little is forgotten.
    for start, end in zip(module.memory.initial_weights, state.weights, strict=True):
        assert end.norm() < 4 * start.norm() + 10


def test_the_memory_learns_what_it_reads():
    # The same token again and again: the loss of its key falls.
    module = build(depth=2, theta_max=0.1, conv_size=1, alpha_bias=-20.0)
    token = torch.randn(1, 1, 16, dtype=FLOAT64)
    losses, state = [], module.init_state(1, dtype=FLOAT64)
    key = F.normalize(
        F.silu(module.memory.k_proj(token) * module.memory.conv1d.weight[8:16, 0, 0]).view(2, 4),
        dim=-1,
    )
    value = F.silu(module.memory.v_proj(token) * module.memory.conv1d.weight[16:, 0, 0]).view(2, 4)
    with torch.no_grad():
        for _ in range(60):
            _, state = call(module, token, state)
            y = F.gelu(torch.einsum("hd,hde->he", key, state.weights[0][0]))
            y = F.layer_norm(torch.einsum("hd,hde->he", y, state.weights[1][0]), (4,))
            losses.append((key + y - value).square().sum().item())
    assert losses[-1] < 0.9 * losses[0]


def test_reset_rows_start_from_the_learned_weights():
    module = build()
    hidden = torch.randn(2, 7, 16, dtype=FLOAT64)
    _, state = call(module, hidden)
    assert not state.fresh.any() and state.offset.tolist() == [3, 3]
    half = state.reset(torch.tensor([True, False]))
    assert half.fresh.tolist() == [True, False] and half.offset.tolist() == [0, 3]
    assert state.offset.tolist() == [3, 3]
    output, _ = call(module, hidden, half)
    torch.testing.assert_close(output[:1], call(module, hidden[:1])[0])
    torch.testing.assert_close(output[1:], call(module, hidden, state)[0][1:])

    def gradient(state):
        output, _ = call(module, hidden, state)
        return torch.autograd.grad(
            output.sum(), module.memory.initial_weights[1], materialize_grads=True
        )

    state = dataclasses.replace(state.detach())
    assert gradient(state)[0].abs().max() == 0
    assert gradient(state.reset())[0].abs().max() > 0


def test_without_writing_tokens_read_the_given_weights_as_they_are():
    module = build(conv_size=1)
    _, state = call(module, torch.randn(1, 7, 16, dtype=FLOAT64))
    tokens = torch.randn(1, 9, 16, dtype=FLOAT64)
    together, after = call(module, tokens, state, write=False)
    assert after is state
    for t in range(9):
        torch.testing.assert_close(
            together[:, t : t + 1], call(module, tokens[:, t : t + 1], state, write=False)[0]
        )


def test_the_state_stays_float32_in_a_bfloat16_module():
    module = Titans(TitansConfig(**SMALL), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    output, after = call(module, torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert output.dtype == torch.bfloat16
    assert after.conv.dtype == torch.bfloat16
    assert {x.dtype for x in (*after.anchor, *after.weights, *after.momentum)} == {torch.float32}
    assert after.nbytes == state.nbytes


@pytest.mark.parametrize("depth", [1, 2])
def test_flops_are_linear_in_tokens_and_grow_with_the_memory(depth):
    small, large = build(depth=depth), build(depth=depth, head_dim=8)
    assert small.flops(200) == 2 * small.flops(100)
    assert large.flops(100) > 2 * small.flops(100)
