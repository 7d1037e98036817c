"""Keys and values grow in place, and no state that was handed out ever notices."""

import copy

import pytest
import torch

from memlm import MemLMConfig
from memlm.layers.attention import Attention
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.attention_state import AttentionState
from memlm.layers.context import CallContext
from memlm.layers.key_values import SPARE
from tests.memory.law_tools import build_model

HIDDEN, PROMPT = 16, 7
pytestmark = pytest.mark.parametrize("window", [None, 5])


def build(window, dtype=torch.float64, **options):
    torch.manual_seed(1)
    options = {"num_heads": 4, "num_key_value_heads": 2, "conv_size": 3, **options}
    config = MemLMConfig(hidden_size=HIDDEN)
    config._attn_implementation = "sdpa"
    return Attention(AttentionConfig(window=window, **options), config).to(dtype)


def tokens(length, rows=2):
    return torch.randn(rows, length, HIDDEN, dtype=torch.float64)


def steps(layer, hidden, state, position):
    """Token by token; the outputs and the state after each."""
    outputs, states = [], []
    for index in range(hidden.shape[1]):
        context = CallContext.plain(len(hidden), 1, position + index)
        output, state = layer(hidden[:, index : index + 1], state, context)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), states


def whole(layer, hidden):
    """All tokens in one call with gradients, which nothing in place may serve."""
    with torch.enable_grad():
        start = layer.init_state(len(hidden), dtype=hidden.dtype)
        return layer(hidden, start, CallContext.plain(*hidden.shape[:2]))[0].detach()


def prompted(layer, hidden):
    start = layer.init_state(len(hidden), dtype=hidden.dtype)
    return layer(hidden, start, CallContext.plain(*hidden.shape[:2]))[1]


def contents(state):
    return {name: tensor.clone() for name, tensor in state.state_dict().items()}


def assert_same(state, expected):
    found = state.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_many_tokens_in_place_equal_one_call(window):
    layer, hidden = build(window), tokens(PROMPT + 2 * SPARE)
    state = prompted(layer, hidden[:, :PROMPT])
    output, states = steps(layer, hidden[:, PROMPT:], state, PROMPT)
    torch.testing.assert_close(output, whole(layer, hidden)[:, PROMPT:])
    rooms = {id(state.room): state.room for state in states}
    assert 1 < len(rooms) <= 4  # most tokens found room


@torch.no_grad()
def test_a_token_is_projected_once_also_where_the_step_is_not_in_cpp(window):
    layer, hidden, projected = build(window), tokens(PROMPT + 3), []
    state = prompted(layer, hidden[:, :PROMPT])
    layer.q_proj.register_forward_hook(lambda *call: projected.append(call))
    steps(layer, hidden[:, PROMPT:], state, PROMPT)
    assert len(projected) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4, "rope": False},
        {"num_key_value_heads": 1, "head_dim": 6, "rope_fraction": 0.34},
        {"head_dim": 20, "qk_norm": True, "output_gate": True},
    ],
)
def test_in_float32_a_token_is_one_call(window, options):
    layer, hidden = build(window, torch.float32, **options), tokens(PROMPT + SPARE + 20).float()
    state = prompted(layer, hidden[:, :PROMPT])
    output, states = steps(layer, hidden[:, PROMPT:], state, PROMPT)
    torch.testing.assert_close(output, whole(layer, hidden)[:, PROMPT:])
    before = contents(states[3])
    again, _ = steps(layer, hidden[:, PROMPT + 4 :], states[3], PROMPT + 4)
    torch.testing.assert_close(again, output[:, 4:])
    assert_same(states[3], before)


@torch.no_grad()
def test_states_stay_as_they_were_and_may_be_continued_again(window):
    layer, hidden, other = build(window), tokens(PROMPT + 6), tokens(PROMPT + 6)
    other[:, : PROMPT + 3] = hidden[:, : PROMPT + 3]
    state = prompted(layer, hidden[:, :PROMPT])
    _, states = steps(layer, hidden[:, PROMPT:], state, PROMPT)
    before = [contents(state) for state in states]
    fork = states[2]
    again, _ = steps(layer, other[:, PROMPT + 3 :], fork, PROMPT + 3)
    torch.testing.assert_close(again, whole(layer, other)[:, PROMPT + 3 :])
    for state, expected in zip(states, before, strict=True):
        assert_same(state, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda state: state.clone(),
        lambda state: state.detach(),
        lambda state: state.reorder(torch.tensor([0, 1])),
        lambda state: AttentionState.from_state_dict(state.state_dict()),
    ],
)
def test_copies_go_their_own_way(window, copied):
    layer, hidden = build(window), tokens(PROMPT + 8)
    state = steps(layer, hidden[:, PROMPT:][:, :4], prompted(layer, hidden[:, :PROMPT]), PROMPT)[1][
        -1
    ]
    twin, before = copied(state), contents(state)
    steps(layer, tokens(4), state, PROMPT + 4)
    assert_same(state, before)
    assert_same(twin, before)
    output, _ = steps(layer, hidden[:, PROMPT + 4 :], twin, PROMPT + 4)
    torch.testing.assert_close(output, whole(layer, hidden)[:, PROMPT + 4 :])
    assert_same(state, before)


@torch.no_grad()
def test_beams_swap_rows_between_tokens(window):
    layer, hidden, order = build(window), tokens(PROMPT + 3), torch.tensor([1, 1, 0])
    _, states = steps(layer, hidden[:, PROMPT:], prompted(layer, hidden[:, :PROMPT]), PROMPT)
    more = tokens(4, 3)
    output, _ = steps(layer, more, states[-1].reorder(order), PROMPT + 3)
    expected = whole(layer, torch.cat([hidden[order], more], 1))[:, PROMPT + 3 :]
    torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_rows_that_were_reset_see_nothing_older(window):
    layer, hidden = build(window), tokens(PROMPT + 4)
    _, states = steps(layer, hidden[:, PROMPT:], prompted(layer, hidden[:, :PROMPT]), PROMPT)
    state = states[-1].reset(torch.tensor([True, False]))
    more = tokens(6)
    position = torch.tensor([0, PROMPT + 4])
    outputs = []
    for index in range(6):
        context = CallContext.plain(2, 1, 1)
        context.position_ids = (position + index)[:, None]
        context.layout.first_position = position + index
        output, state = layer(more[:, index : index + 1], state, context)
        outputs.append(output)
    output = torch.cat(outputs, 1)
    torch.testing.assert_close(output[:1], whole(layer, more[:1]))
    expected = whole(layer, torch.cat([hidden, more], 1))[1:, PROMPT + 4 :]
    torch.testing.assert_close(output[1:], expected)


def test_gradients_reach_earlier_tokens(window):
    layer, hidden = build(window), tokens(PROMPT + 3).requires_grad_()
    output, _ = steps(layer, hidden[:, PROMPT:], prompted(layer, hidden[:, :PROMPT]), PROMPT)
    found = torch.autograd.grad(output.square().sum(), hidden)[0]
    start = layer.init_state(2, dtype=torch.float64)
    output, _ = layer(hidden, start, CallContext.plain(2, PROMPT + 3))
    expected = torch.autograd.grad(output[:, PROMPT:].square().sum(), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_inference_mode_and_no_grad_take_turns(window):
    layer, hidden = build(window), tokens(PROMPT + 6)
    outputs, position = [], PROMPT
    with torch.no_grad():
        state = prompted(layer, hidden[:, :PROMPT])
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            output, states = steps(layer, hidden[:, position : position + 2], state, position)
        outputs.append(output.clone())
        state, position = states[-1], position + 2
    torch.testing.assert_close(torch.cat(outputs, 1), whole(layer, hidden)[:, PROMPT:])


@torch.no_grad()
def test_bytes_are_those_held_and_what_is_saved_is_what_is_there(window):
    layer, hidden = build(window), tokens(PROMPT + 1)
    prompt = prompted(layer, hidden[:, :PROMPT])
    assert prompt.nbytes == sum(tensor.nbytes for tensor in prompt.tensors().values())
    state = steps(layer, hidden[:, PROMPT:], prompt, PROMPT)[1][-1]
    saved = state.state_dict()
    kept = PROMPT + 1 if window is None else window - 1
    assert saved["keys"].shape == (2, kept, 2, 4)
    assert all(tensor.is_contiguous() for tensor in saved.values())
    slot = 2 * 2 * 4 * 8 + 8  # keys and values of two heads, and a position
    held = prompt.keys.shape[1] + SPARE
    assert state.nbytes == 2 * held * slot + state.tail.nbytes


@torch.no_grad()
def test_keys_before_a_reset_are_gone_with_the_next_tokens(window):
    layer, hidden = build(window), tokens(PROMPT)
    state = prompted(layer, hidden).reset()
    _, state = layer(hidden, state, CallContext.plain(*hidden.shape[:2]))
    assert_same(state, contents(prompted(layer, hidden)))
    assert state.nbytes == prompted(layer, hidden).nbytes


@torch.no_grad()
def test_keys_of_former_documents_do_not_pile_up(window):
    """Lanes of documents: what a state holds is no more than the longest that still goes on."""
    model = build_model([{"mixer": {"type": "attention", "num_heads": 2, "window": window}}])
    ids = torch.randint(1, 40, (2, 24))
    segments = torch.stack([torch.arange(24) // 5, torch.arange(24) // 7]) + 1
    positions = torch.stack([torch.arange(24) % 5, torch.arange(24) % 7])
    expected = model(ids, segment_ids=segments).logits
    states, found = None, []
    for piece in (slice(0, 9), slice(9, 12), slice(12, 20), slice(20, 21), slice(21, 24)):
        options = {"memory_states": states, "return_memory_states": True}
        output = model(ids[:, piece], position_ids=positions[:, piece], **options)
        states = output.memory_states
        found.append(output.logits)
        assert states["0.mixer"].positions.shape[1] <= 7
    torch.testing.assert_close(torch.cat(found, 1), expected)
