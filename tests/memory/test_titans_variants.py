"""What is special about mac, mag and mal, beside the laws."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.layers.context import CallContext
from memlm.layers.persistent_attention import PersistentAttention
from memlm.memory import memory_class
from memlm.memory.titans_config import TitansConfig
from memlm.memory.titans_memory import TitansState, unit_length

FLOAT64 = torch.float64
SMALL = {"num_heads": 2, "head_dim": 4, "expansion": 2, "chunk_size": 3, "attention_heads": 2}


def build(variant, **options):
    torch.manual_seed(0)
    config = TitansConfig(**SMALL | {"variant": variant, "window": 4, "segment": 4} | options)
    module = memory_class("titans").build(config, 16).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def call(module, hidden, states=None, first=0, **options):
    """Output and states of tokens from position `first` on; of new documents without states."""
    B, T, _ = hidden.shape
    if states is None:
        states = [
            module.init_state(B, dtype=FLOAT64),
            module.init_attention_state(B, dtype=FLOAT64),
        ]
    context = CallContext.plain(B, T, first_position=first)
    output, *states = module(hidden, states[0], context, states[1], **options)
    return output, states


def rotate(x, position):
    """Channels i and i + D/2 of [.., D] turned by position * 10000^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=FLOAT64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(attention, query, seen, positions, at):
    """One token over persistent tokens and `seen`, softmax by hand."""
    heads = lambda x: x.unflatten(-1, (attention.num_heads, -1))  # noqa: E731
    q = heads(attention.q_proj(query))
    scores, values = [], []
    for vector in attention.persistent:
        scores.append((q * heads(attention.k_proj(vector))).sum(-1))
        values.append(heads(attention.v_proj(vector)))
    for vector, position in zip(seen, positions, strict=True):
        key = rotate(heads(attention.k_proj(vector)), position)
        scores.append((rotate(q, at) * key).sum(-1))
        values.append(heads(attention.v_proj(vector)))
    weights = (torch.stack(scores) * attention.head_dim**-0.5).softmax(0)
    return attention.o_proj((weights[:, :, None] * torch.stack(values)).sum(0).flatten())


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_mac_is_the_papers_order_token_by_token(depth):
    module = build("mac", depth=depth, persistent_tokens=2, conv_size=None, theta_max=0.05)
    memory, segment = module.memory, 4
    x = torch.randn(11, 16, dtype=FLOAT64)
    state = memory.init_state(1, dtype=FLOAT64)
    expected, S, H = [], [], []
    for t, token in enumerate(x):
        if t % segment == 0:
            S, H = [], []
            weights = memory.start(state.weights, state.fresh)  # the segment before has ended
        query = unit_length(F.silu(memory.q_proj(token)).view(1, 1, 2, 4))
        h = module.retrieved_norm(module.m_proj(memory.read(weights, query).flatten()))
        S, H = [*S, token], [*H, h]
        places = list(range(len(S)))
        y = attend(module.attention, token, H + S, places + places, len(S) - 1)
        o, state = memory(module.update_norm(token + y)[None, None], state, None)
        m = module.m_proj(o.flatten())
        gate = module.gate
        expected.append(gate.o_proj(gate.y_norm(y) * F.silu(gate.m_norm(m))))
    torch.testing.assert_close(call(module, x[None])[0][0], torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mag", "mal"])
def test_mag_and_mal_are_the_papers_formulas(variant):
    module = build(variant, depth=1, persistent_tokens=2)
    x = torch.randn(9, 16, dtype=FLOAT64)
    o, _ = module.memory(x[None], module.memory.init_state(1, dtype=FLOAT64), None)
    m = module.m_proj(module.o_norm(o[0]).flatten(-2))
    inner = module.norm(x + m) if variant == "mal" else x
    y = []
    for t in range(9):
        seen = range(max(0, t - 3), t + 1)  # a window of four tokens
        y.append(attend(module.attention, inner[t], [inner[i] for i in seen], seen, t))
    expected = torch.stack(y)
    if variant == "mag":
        gate = module.gate
        expected = gate.o_proj(gate.y_norm(expected) * F.silu(gate.m_norm(m)))
    torch.testing.assert_close(call(module, x[None])[0][0], expected)


@torch.no_grad()
def test_persistent_tokens_look_the_same_from_everywhere():
    torch.manual_seed(0)
    config = TitansConfig(**SMALL, variant="mag", window=4)
    attention = PersistentAttention(config.attention(), 16, 3).double()
    hidden = torch.randn(2, 9, 16, dtype=FLOAT64)
    state = attention.init_state(2, dtype=FLOAT64)

    def output(first):
        return attention(hidden, state, CallContext.plain(2, 9, first_position=first))[0]

    torch.testing.assert_close(output(50_000), output(1), rtol=0, atol=1e-9)
    with_tokens = output(1)
    attention.persistent += 1
    assert (with_tokens - output(1)).abs().amax(-1).min() > 1e-6  # every token sees them


@torch.no_grad()
def test_a_mac_memory_reset_within_a_segment_forgets_what_it_retrieved():
    module = build("mac", depth=2, persistent_tokens=2)
    x = torch.randn(1, 12, 16, dtype=FLOAT64)
    _, (memory, attention) = call(module, x[:, :6])
    assert memory.positions.tolist() == [[4, 5, 2, 3]]  # two are of the segment before
    reset = memory.reset()
    assert (reset.positions == -1).all() and reset.fresh.all()
    # Nothing of the old memory is left: another document's, reset, gives the same.
    _, (other, _) = call(module, torch.randn(1, 6, 16, dtype=FLOAT64))
    kept = dataclasses.replace(other.reset(), keys=other.keys + 1)
    first, _ = call(module, x[:, 6:], [reset, attention], first=6)
    second, _ = call(module, x[:, 6:], [kept, attention], first=6)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, call(module, x[:, 6:], [memory, attention], first=6)[0])


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_the_window_of_a_curriculum_reaches_the_attention_inside(variant):
    options = {"type": "titans", **SMALL, "variant": variant, "segment": 8, "rope": False}
    layers = [{"mixer": {**options, "window": 8}}]
    model = MemLMForCausalLM(MemLMConfig(hidden_size=16, layers=layers)).double()
    ids = torch.randint(1, 50, (1, 20))

    def changed(window):
        model.set_attention_window(window)
        with torch.no_grad():
            alone = model(ids, use_memory=False).logits
            other = ids.clone()
            other[0, 0] = 1 + ids[0, 0] % 49
            return (alone - model(other, use_memory=False).logits).abs().amax(-1)[0] > 1e-12

    assert model.max_context is None
    assert changed(3).nonzero().flatten().tolist() == [0, 1, 2]
    assert changed(None).nonzero().flatten().tolist() == list(range(8))


def test_other_conventions_than_the_trained_ones_warn(tmp_path, recwarn):
    def layers(**options):
        return [{"mixer": {"type": "titans", "num_heads": 2, **options}}]

    model = MemLMForCausalLM(MemLMConfig(hidden_size=16, layers=layers(chunk_size=8)))
    model.save_pretrained(tmp_path)
    MemLMForCausalLM.from_pretrained(tmp_path)
    assert not [w for w in recwarn if "trained with" in str(w.message)]
    with pytest.warns(UserWarning, match=r"trained with chunk_size 8 \(now 16\)"):
        loaded = MemLMForCausalLM.from_pretrained(tmp_path, layers=layers(chunk_size=16))
    with pytest.warns(UserWarning, match=r"read inclusive \(now chunk_start\)"):
        other = layers(chunk_size=8, read="chunk_start")
        MemLMForCausalLM(MemLMConfig(hidden_size=16, layers=other)).load_state_dict(
            loaded.state_dict()  # which still knows what it was trained with
        )


def test_the_exact_linear_memory_does_not_depend_on_the_chunk_size():
    outputs = []
    for chunk_size in (3, 64):
        module = build("mag", depth=1, exact=True, chunk_size=chunk_size)
        torch.manual_seed(1)
        hidden = torch.randn(2, 23, 16, dtype=FLOAT64)
        first, states = call(module, hidden[:, :7])
        second, states = call(module, hidden[:, 7:], states, first=7)
        outputs.append(torch.cat([first, second], 1))
        assert TitansState.from_state_dict(states[0].state_dict()).anchor[0].shape == (2, 0)
    torch.testing.assert_close(*outputs)


def test_ablations_have_no_gate_for_what_they_leave_out():
    full, bare = build("mag"), build("mag", momentum=False, decay=False, conv_size=None)
    assert full.memory.gates == ["alpha", "eta", "theta"] and bare.memory.gates == ["theta"]
    assert bare.memory.gates_bias.shape == (2,) and bare.memory.conv1d is None
    alpha, eta, theta = bare.memory._gates(torch.randn(1, 3, 16, dtype=FLOAT64))
    assert not alpha.any() and not eta.any() and (theta > 0).all()
    assert call(bare, torch.randn(1, 9, 16, dtype=FLOAT64))[0].isfinite().all()
