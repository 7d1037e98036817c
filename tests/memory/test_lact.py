import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data.mqar import IGNORED, MqarRows
from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory import memory_config
from memlm.memory.lact import LaCT, LaCTConfig

SMALL = {"num_heads": 2, "head_dim": 4, "chunk_size": 4}
FLOAT64 = torch.float64


def build(hidden_size=16, **options):
    """A module in float64 whose linear layers are large enough to matter."""
    module = LaCT(LaCTConfig(**SMALL | options), hidden_size).double()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    return module


def call(module, hidden, state=None, **context):
    """The tokens of new documents, or, with a state, later tokens of carried ones."""
    context["first_position"] = 0 if state is None else 9
    state = module.init_state(len(hidden), dtype=hidden.dtype) if state is None else state
    return module(hidden, state, CallContext.plain(*hidden.shape[:2], **context))


def test_the_layer_is_the_published_formula():
    # Two chunks of four tokens: the second reads what the first has taught.
    module = build(step_size=0.1)
    x = torch.randn(8, 16, dtype=FLOAT64)
    w = {name: p.detach() for name, p in module.named_parameters()}
    qkv = torch.cat([x @ w[f"{name}_proj.weight"].t() for name in "qkv"], -1)
    padded = F.pad(qkv, (0, 0, 3, 0))
    qkv = F.silu(sum(padded[j : j + 8] * w["conv1d.weight"][:, 0, j] for j in range(4)))
    q, k, v = (part.view(8, 2, 4) for part in qkv.chunk(3, -1))
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    gates = x @ w["gates_proj.weight"].t() + w["gates_bias"]
    steps = F.softplus(gates[:, :6]).view(8, 2, 3)
    outputs = torch.zeros(8, 2, 4, dtype=FLOAT64)
    for head in range(2):
        weights = [*w["initial_up"][head].chunk(2, -1), w["initial_down"][head]]
        weights = [weight.requires_grad_() for weight in weights]

        def read(key, weights=weights):
            return (F.silu(key @ weights[0]) * (key @ weights[1])) @ weights[2]

        outputs[:4, head] = read(q[:4, head])
        agreement = (read(k[:4, head]) * v[:4, head]).sum(-1)
        taught = []
        for j, weight in enumerate(weights):
            loss = -(steps[:4, head, j] * agreement).sum()
            # The momentum is zero before the first chunk.
            moved = weight - torch.autograd.grad(loss, weight, retain_graph=True)[0]
            taught.append(moved * weight.norm(dim=0) / moved.norm(dim=0))
        outputs[4:, head] = read(q[4:, head], taught)
    outputs = F.rms_norm(outputs, (4,), eps=1e-6).flatten(1)
    expected = outputs @ w["o_proj.weight"].t()
    torch.testing.assert_close(call(module, x[None])[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, hidden_size, sizes",
    [
        ({}, 128, (1, 128, 128)),
        ({}, 1024, (4, 256, 256)),
        ({"num_heads": 2}, 128, (2, 64, 64)),
        ({"head_dim": 16, "expansion": 1.5}, 64, (4, 16, 24)),
    ],
)
def test_sizes_follow_the_hidden_size(options, hidden_size, sizes):
    config = memory_config({"type": "lact", **options})
    assert config.sizes(hidden_size) == sizes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"head_dim": 5, "expansion": 1.5}, "expansion 1.5 times head_dim 5"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        LaCT(LaCTConfig(**options), 64)


def test_a_chunk_longer_than_the_window_beside_it():
    def config(window):
        mixer = {"type": "sliding_attention", "window": window}
        MemLMConfig(layers=[{"mixer": mixer, "memory": {"type": "lact", "chunk_size": 16}}])

    with pytest.raises(UserError, match=r"\(16\) is longer than the attention window \(8\)"):
        config(8)
    config(16)


def test_start_values_survive_the_initialisation_of_a_model():
    layers = [{"repeat": 1, "memory": {"type": "lact", "momentum_bias": 2.0}}]
    model = MemLMForCausalLM(MemLMConfig(vocab_size=8, hidden_size=512, layers=layers))
    (module,) = (module for module in model.modules() if isinstance(module, LaCT))
    steps, eta = module._gates(torch.zeros(1, 1, 512))
    torch.testing.assert_close(steps, torch.full((1, 1, 2, 3), 16 / 2048))
    torch.testing.assert_close(eta, torch.full((1, 1, 2), 2.0).sigmoid())
    assert module.initial_up.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert module.initial_down.std().item() == pytest.approx(256**-0.5, rel=0.1)


def test_a_chunk_is_read_from_the_next_one_on():
    module = build()
    hidden = torch.randn(1, 8, 16, dtype=FLOAT64)
    changed = hidden.clone()
    changed[:, 1] += 1
    before, after = call(module, hidden)[0], call(module, changed)[0]
    # Nothing of the first chunk but what the queries' convolution hands on, within the chunk.
    assert (before - after)[:, 5:].abs().amax() > 1e-3
    module = build(conv_size=1)
    before, after = call(module, hidden)[0], call(module, changed)[0]
    assert torch.equal(before[:, 2:4], after[:, 2:4])
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_without_momentum(orthogonalise):
    module = build(momentum=False, orthogonalise=orthogonalise)
    assert module.gates_bias.shape == (6,)
    hidden = torch.randn(2, 11, 16, dtype=FLOAT64)
    whole, last = call(module, hidden)
    first, state = call(module, hidden[:, :6])
    rest, state = call(module, hidden[:, 6:], state)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.weights, last.weights, rtol=1e-9, atol=1e-9)
    assert state.nbytes < 0.75 * call(build(), hidden)[1].nbytes
    again = type(state).from_state_dict(state.state_dict())
    assert again.momentum[0].shape == (2, 0, 4, 8) and again.nbytes == state.nbytes
    half = state.reset(torch.tensor([True, False]))
    merged = half.where(torch.tensor([True, False]), state)
    assert torch.equal(merged.weights[0], half.weights[0])


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_untrained_defaults_stay_stable_on_repeated_tokens(orthogonalise):
    module = LaCT(LaCTConfig(chunk_size=64, orthogonalise=orthogonalise), 64)
    one, other = torch.randn(2, 1, 1, 64)
    parts = [one.expand(1, 512, 64), torch.randn(1, 512, 64), other.expand(1, 512, 64)]
    with torch.no_grad():
        output, state = call(module, torch.cat(parts, 1))
    assert output.isfinite().all()
    for start, end in zip((module.initial_up, module.initial_down), state.weights, strict=True):
        torch.testing.assert_close(end[0].norm(dim=-2), start.norm(dim=-2))
    assert all(s.norm() < 1e3 for s in state.momentum)


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
        return torch.autograd.grad(output.sum(), module.initial_down, materialize_grads=True)

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
    module = LaCT(LaCTConfig(**SMALL), 16).bfloat16()
    state = module.init_state(2, dtype=torch.bfloat16)
    output, after = call(module, torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert output.dtype == torch.bfloat16
    assert after.conv.dtype == torch.bfloat16
    wide = (*after.weights, *after.momentum, *after.pending, after.gate_sum)
    assert {x.dtype for x in wide} == {torch.float32}
    assert after.nbytes == state.nbytes


def test_flops_are_linear_in_chunks_and_count_the_orthogonalisation():
    plain, orthogonal = build(orthogonalise=False), build(orthogonalise=True)
    for module in (plain, orthogonal):
        assert module.flops(400) == 2 * module.flops(200)
    # Five iterations of x x^T, its square and their product with x, for three 4 x 4 matrices of
    # two heads, in 50 chunks.
    assert orthogonal.flops(200) - plain.flops(200) == 50 * 2 * 3 * 5 * 3 * (2 * 4**3)


@pytest.mark.slow
def test_two_layers_learn_to_recall_what_the_chunk_before_said():
    torch.manual_seed(0)
    memory = {"type": "lact", "num_heads": 2, "head_dim": 32, "chunk_size": 16}
    memory["orthogonalise"] = True
    model = MemLMForCausalLM(
        MemLMConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=128,
            layers=[{"repeat": 2, "mixer": memory, "ffn": "swiglu"}],
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    # Eight pairs fill the first chunk, their questions the second.
    rows = MqarRows(vocab_size=32, length=32, pairs=8, seed=0, random_filler=False)

    def forward(start, stop):
        batch = rows.batch(np.arange(start, stop))
        labels = torch.from_numpy(batch["labels"])
        logits = model(torch.from_numpy(batch["input_ids"]), use_cache=False).logits
        asked = labels != IGNORED
        return logits[asked], labels[asked]

    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        loss = F.cross_entropy(*forward(32 * step, 32 * (step + 1)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits, labels = forward(10**6, 10**6 + 128)
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    print(f"accuracy {accuracy:.4f}")
    assert accuracy > 0.98
