import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.layers.context import SequenceLayout
from memlm.layers.rotary import Rotary
from memlm.memory import CallContext, MemorizingAttention, MemorizingAttentionConfig

SIZES = {"window": 5, "segment": 4, "capacity": 8, "top_k": 3, "num_heads": 4}


def module(**options):
    torch.manual_seed(0)
    config = MemorizingAttentionConfig(**{**SIZES, **options})
    memory = MemorizingAttention(config, hidden_size=16).double()
    with torch.no_grad():
        memory.memory.head_bias.normal_()
        memory.attention.log_temperature.add_(torch.randn(4) / 4)
    return memory


def new_states(memory, batch_size=1):
    kind = {"dtype": torch.float64}
    return memory.init_state(batch_size, **kind), memory.init_attention_state(batch_size, **kind)


def run(memory, hidden, states=None, first_position=0, **options):
    """One call of rows of one document: the output and (store, attention state)."""
    context = CallContext.plain(*hidden.shape[:2], first_position=first_position)
    store, attention = states or new_states(memory, len(hidden))
    out, store, attention = memory(hidden, store, context, attention, **options)
    return out, (store, attention)


def expected_output(memory, hidden, use_memory=True):
    """One row, one document from position 0, straight from the class's description."""
    config, attention = memory.config, memory.attention
    heads, dim = attention.num_heads, attention.head_dim
    q, k, v = (
        proj(hidden).unflatten(-1, (-1, dim))
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    positions = torch.arange(len(hidden))
    rotated_q, rotated_k = q, k
    if config.rope:
        angles = Rotary(dim, config.rope_theta).angles(positions, torch.float64)
        rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=1)
    rows = []
    for p in range(len(hidden)):
        boundary = p // config.segment * config.segment
        out = []
        for h in range(heads):
            group = h // (heads // attention.num_key_value_heads)
            temperature = attention.log_temperature[h].exp()
            near = slice(max(0, p - config.window + 1), p + 1)
            weights = (temperature * rotated_k[near, group] @ rotated_q[p, h]).softmax(0)
            local = weights @ v[near, group]
            visible = slice(max(0, boundary - config.capacity), boundary)
            if not use_memory or boundary == 0:
                out.append(local)
                continue
            logits = temperature * k[visible, group] @ q[p, h]
            logits, found = logits.topk(min(config.top_k, len(logits)))
            recalled = logits.softmax(0) @ v[visible, group][found]
            bias = memory.memory.head_bias[h]
            gate = bias.sigmoid() if config.head_gate == "sigmoid" else bias.tanh()
            out.append(gate * recalled + (1 - gate) * local)
        rows.append(attention.o_proj(torch.cat(out)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 6},
        {"num_key_value_heads": 1, "rope": False, "head_gate": "tanh"},
        {"segment": 3, "capacity": 7, "top_k": 7},
        {"segment": 1, "window": 1, "capacity": 5, "top_k": 1},
    ],
    ids=str,
)
def test_output_is_the_description(options):
    memory = module(**options)
    hidden = torch.randn(21, 16, dtype=torch.float64)
    torch.testing.assert_close(run(memory, hidden[None])[0][0], expected_output(memory, hidden))
    off, _ = run(memory, hidden[None], use_memory=False)
    torch.testing.assert_close(off[0], expected_output(memory, hidden, use_memory=False))


def test_where_nothing_is_stored_the_window_alone_speaks():
    memory = module()
    hidden = torch.randn(1, 9, 16, dtype=torch.float64)
    out, _ = run(memory, hidden)
    alone, states = run(memory, hidden, use_memory=False)
    assert torch.equal(out[:, :4], alone[:, :4])
    assert not torch.isclose(out[:, 4:], alone[:, 4:]).all(-1).any()
    assert not states[0].valid.any()  # off, nothing is written


def test_a_closed_head_gate_is_exactly_the_window_and_can_open():
    memory = module(head_gate="tanh")
    memory.memory.init_weights()
    hidden = torch.randn(2, 21, 16, dtype=torch.float64)
    out, _ = run(memory, hidden)
    assert torch.equal(out, run(memory, hidden, use_memory=False)[0])
    out.square().sum().backward()
    assert (memory.memory.head_bias.grad.abs() > 0).all()
    memory = module()
    memory.memory.init_weights()  # the paper's gate: half of each
    torch.testing.assert_close(run(memory, hidden[:1])[0][0], expected_output(memory, hidden[0]))
    assert not torch.allclose(run(memory, hidden)[0], out)


def test_after_overflow_every_live_entry_is_found_and_no_other():
    # Every query is its own key: an entry that is found is what the token says again.
    memory = module(top_k=1, rope=False, window=4, head_gate="tanh")
    attention = memory.attention
    with torch.no_grad():
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        memory.memory.head_bias.fill_(30.0)  # tanh is 1: only what was found speaks
    torch.manual_seed(1)
    words = torch.randn(40, 16, dtype=torch.float64)
    _, states = run(memory, words[None])
    store = states[0]
    assert sorted(store.positions[0].tolist()) == list(range(32, 40))
    asked = words[None]
    context = CallContext.plain(1, 40, first_position=40, write=False)
    context.position_ids = torch.full((1, 40), 40)
    out, same, _ = memory(asked, store, context, states[1])
    assert same is store
    own = attention.o_proj(attention.v_proj(words))
    found = torch.isclose(out[0], own).all(-1)
    assert found.tolist() == [False] * 32 + [True] * 8


def test_slots_that_were_never_written_are_never_read():
    memory = module()
    hidden = torch.randn(2, 10, 16, dtype=torch.float64)
    _, (store, attention) = run(memory, hidden[:, :6])
    assert store.valid.sum(1).tolist() == [4, 4]

    def dirty(part):
        return torch.where(store.valid[..., None], part, torch.nan)

    spoiled = dataclasses.replace(
        store, keys=dirty(store.keys), values=tuple(dirty(part) for part in store.values)
    )
    expected, _ = run(memory, hidden[:, 6:], (store, attention), 6)
    rest = hidden[:, 6:].clone().requires_grad_()
    out, _ = run(memory, rest, (spoiled, attention), 6)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert rest.grad.isfinite().all()


def test_a_reset_row_beside_a_full_one_reads_nothing_old():
    memory = module(top_k=5)  # more than a segment has
    hidden = torch.randn(2, 18, 16, dtype=torch.float64)
    _, (store, attention) = run(memory, hidden[:, :8])
    second = torch.tensor([False, True])
    store, attention = store.reset(second), attention.reset(second)

    def dirty(part):
        return part.masked_fill(second[:, None, None], torch.nan)

    store = dataclasses.replace(
        store, keys=dirty(store.keys), values=tuple(dirty(part) for part in store.values)
    )
    positions = torch.stack((torch.arange(8, 18), torch.arange(10)))
    layout = SequenceLayout.build(positions, torch.ones_like(positions).bool(), positions == 0)
    rest = hidden[:, 8:].clone().requires_grad_()
    out, _, _ = memory(rest, store, CallContext(layout, positions), attention)
    torch.testing.assert_close(out[0], expected_output(memory, hidden[0])[8:])
    torch.testing.assert_close(out[1], expected_output(memory, hidden[1, 8:]))
    out.sum().backward()
    assert rest.grad.isfinite().all()


def test_documents_of_a_row_and_rows_of_a_batch_never_meet():
    memory = module()
    torch.manual_seed(2)
    hidden = torch.randn(2, 20, 16, dtype=torch.float64)
    positions = torch.cat((torch.arange(9), torch.arange(11))).expand(2, -1)
    valid = torch.ones_like(positions, dtype=torch.bool)
    layout = SequenceLayout.build(positions, valid, positions == 0)
    store, attention = new_states(memory, 2)
    out, store, _ = memory(hidden, store, CallContext(layout, positions), attention)
    for row in range(2):
        torch.testing.assert_close(out[row, :9], expected_output(memory, hidden[row, :9]))
        torch.testing.assert_close(out[row, 9:], expected_output(memory, hidden[row, 9:]))
    assert sorted(store.positions[0].tolist()) == list(range(8))  # of the second document


def test_keys_learn_from_what_is_found_in_the_same_call():
    memory = module(head_gate="tanh")
    with torch.no_grad():
        memory.memory.head_bias.fill_(30.0)  # nothing from the window
    hidden = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    out, _ = run(memory, hidden)
    (gradient,) = torch.autograd.grad(out[0, 5].sum(), hidden, retain_graph=True)
    assert (gradient[0, :4].abs().sum(-1) > 0).sum() >= 3
    assert gradient[0, 4].abs().sum() == gradient[0, 6:].abs().sum() == 0
    out.square().sum().backward()
    assert memory.attention.k_proj.weight.grad.abs().sum() > 0


def test_a_window_is_not_capped_below_the_segment():
    mixer = {"type": "memorizing_attention", **SIZES}
    layers = [{"mixer": mixer, "ffn": "swiglu"}]
    model = MemLMForCausalLM(MemLMConfig(vocab_size=30, hidden_size=16, layers=layers))
    model.set_attention_window(4)
    assert model.model.layers[0].mixer.module.attention.window == 4
    with pytest.raises(UserError, match=r"window of 3 is shorter than the memory's segment \(4\)"):
        model.set_attention_window(3)


def test_sizes():
    memory = module(num_key_value_heads=2)
    state = memory.init_state(3, dtype=torch.bfloat16)
    per_slot = 2 * 2 * 4 * 2  # keys and values of 2 heads of 4 channels in 2 bytes
    assert state.nbytes == 3 * (8 * (per_slot + 16) + 24 + 4 * (per_slot + 8))
    projections = 2 * 16 * 16 + 2 * 16 * 8
    seen = 4 * (8 * 5 - 10) * 16
    assert memory.flops(8) == 2 * 8 * projections + seen + 2 * 8 * (8 + 2 * 3) * 16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"segment": 0}, "segment is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k 9 is more than capacity 8"),
        ({"segment": 6}, "segment 6 is more than window 5"),
        ({"segment": 9, "window": 9}, "segment 9 is more than capacity 8"),
        ({"window": 0}, "window must be at least 1"),
        ({"num_heads": 3}, "16 is not a multiple of num_heads 3"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=f"^memorizing_attention: .*{message}"):
        module(**options)
