"""Settings under which the memory must not diverge, and some under which it is known to."""

import pytest
import torch

from memlm.layers.context import CallContext
from memlm.memory.records import record_surprise
from memlm.memory.titans import Titans
from memlm.memory.titans_config import TitansConfig


def build(**options):
    torch.manual_seed(0)
    module = Titans(TitansConfig(**{"num_heads": 1, "head_dim": 16} | options), 16)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return module


def tokens(length, correlation):
    """Unit-scale tokens of which a share `correlation` (of the variance) is one fixed direction."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(1, 1, 16, generator=generator)
    own = torch.randn(1, length, 16, generator=generator)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


def gradient_norm(module, hidden):
    """Outer gradient of all parameters and inputs through the whole row."""
    hidden = hidden.clone().requires_grad_()
    context = CallContext.plain(*hidden.shape[:2])
    output, state = module(hidden, module.init_state(len(hidden)), context)
    assert output.isfinite().all()
    assert all(w.isfinite().all() for w in (*state.weights, *state.momentum))
    leaves = [hidden, *module.parameters()]
    gradients = torch.autograd.grad((output - hidden.roll(-1, 1)).square().mean(), leaves)
    return sum(g.square().sum() for g in gradients).sqrt().item(), gradients[1:]


def check(depth, length, correlation, chunk_size):
    module = build(depth=depth, chunk_size=chunk_size)
    hidden = tokens(length, correlation)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(4):  # untrained, and after some steps
        norm, gradients = gradient_norm(module, hidden)
        assert norm < 100
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_defaults_have_finite_small_gradients_on_keys_that_repeat(depth):
    check(depth, length=256, correlation=0.99, chunk_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_defaults_have_finite_small_gradients_on_8192_tokens(depth, correlation, chunk_size):
    check(depth, 8192, correlation, chunk_size)


def test_weights_that_fade_are_what_makes_a_deep_memory_unstable():
    options = {"default": {}, "faded": {"alpha_bias": -6.0}, "kept": {"decay": False}}
    hidden = tokens(1024, 0.99)
    norms = {name: gradient_norm(build(depth=4, **o), hidden)[0] for name, o in options.items()}
    assert norms["faded"] > 1000
    assert max(norms["default"], norms["kept"]) < 10


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_default_steps_are_large_enough_to_learn(depth, chunk_size):
    # A chunk of keys again and again. Behind a layer norm the loss cannot fall to zero.
    module = build(depth=depth, chunk_size=chunk_size, num_heads=4, conv_size=None)
    for projection in (module.memory.k_proj, module.memory.v_proj):
        torch.nn.init.normal_(projection.weight, std=0.5)
    hidden = tokens(chunk_size, 0.0).repeat(1, 9, 1)
    with record_surprise(module) as records:
        module(hidden, module.init_state(1), CallContext.plain(*hidden.shape[:2]))
    (surprise,) = (record.joined().view(9, -1).mean(1) for record in records.values())
    assert surprise[8] < 0.7 * surprise[0]


@torch.no_grad()
@pytest.mark.parametrize("average", [True, False])
def test_averaged_momentum_is_what_keeps_large_steps_stable(average):
    options = {"average_momentum": average, "theta_max": 0.1, "theta_bias": 2.0}
    module = build(depth=1, chunk_size=16, **options)
    _, state = module(tokens(1024, 0.99), module.init_state(1), CallContext.plain(1, 1024))
    grown = not state.weights[0].isfinite().all() or state.weights[0].norm() > 1e3
    assert grown != average


@torch.no_grad()
def test_a_bound_on_gradients_holds_steps_that_are_too_large():
    moved = {}
    for clip in (None, 1.0):
        module = build(depth=2, theta_max=2.0, alpha_bias=-6.0, clip=clip)
        _, state = module(tokens(512, 0.99), module.init_state(1), CallContext.plain(1, 512))
        moved[clip] = (state.weights[1][0] - module.memory.initial_weights[1]).norm()
    assert moved[1.0] < moved[None] / 5
