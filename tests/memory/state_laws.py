"""Laws of what a token sees and what a state holds."""

import copy
import os
import tempfile

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlm import MemLMForCausalLM
from memlm.memory.base import AttendingMemory
from tests.memory.law_tools import (
    LENGTH,
    VOCABULARY,
    WINDOW,
    Case,
    assert_close,
    assert_same_bits,
    draw_cuts,
    draw_ids,
    model_of,
    pieces,
    run,
    snapshot,
    variant_of,
)


@torch.no_grad()
def chunk(case: Case, data) -> None:
    """Any split of a sequence, the state passed on, equals one call."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), label="dtype")
    model = model_of(case, dtype)
    ids = draw_ids(data, 2)
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(model, ids[:, piece], states)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), run(model, ids)[0])


@torch.no_grad()
def isolation(case: Case, data) -> None:
    """Rows never mix; reset rows behave as new and leave the others alone."""
    model = model_of(case)
    ids = draw_ids(data, 3)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    whole, _ = run(model, ids)
    for row in range(3):
        assert_close(whole[row : row + 1], run(model, ids[row : row + 1])[0])

    first, states = run(model, ids[:, :cut])
    assert_close(first, whole[:, :cut])
    rows = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3), label="reset"))
    states = {name: state.reset(rows) for name, state in states.items()}
    second, _ = run(model, ids[:, cut:], states)
    as_new, _ = run(model, ids[:, cut:])
    assert_close(second, torch.where(rows[:, None, None], as_new, whole[:, cut:]))
    everything = {name: state.reset() for name, state in states.items()}
    assert_close(run(model, ids[:, cut:], everything)[0], as_new)


@torch.no_grad()
def packed(case: Case, data) -> None:
    """Documents packed in a row are as if each were alone, also with a split anywhere."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    segments = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    documents = []
    for row in range(2):
        start = 0
        for label in range(1, 5):
            start += data.draw(st.sampled_from([0, 0, 1, 3]), label="gap")
            end = min(LENGTH, start + data.draw(st.integers(1, 11), label="document"))
            if start >= end:
                break
            segments[row, start:end] = label
            positions[row, start:end] = torch.arange(end - start)
            documents.append((row, start, end))
            start = end
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(
            model,
            ids[:, piece],
            states,
            segment_ids=segments[:, piece],
            position_ids=positions[:, piece],
        )
        parts.append(logits)
    split = torch.cat(parts, 1)
    whole, _ = run(model, ids, segment_ids=segments, position_ids=positions)
    bare, _ = run(model, ids, segment_ids=segments)
    for row, start, end in documents:
        expected, _ = run(model, ids[row : row + 1, start:end])
        for logits in (whole, bare, split):
            assert_close(logits[row, start:end], expected[0])


@torch.no_grad()
def off(case: Case, data) -> None:
    """A gate of zero and use_memory=False both give the base model's logits, bit by bit.

    A memory with an attention of its own goes on attending instead: nothing of the memory reaches
    the logits then, and the attention streams.
    """
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    gated = variant_of(case, **case.closed)
    base = variant_of(case, with_memory=False)  # with the weights of the one it is compared to
    assert not base.load_state_dict(gated.state_dict(), strict=False).missing_keys
    expected, _ = run(base, ids)
    expected_rest, _ = run(base, ids[:, cut:], run(base, ids[:, :cut])[1])
    for options in ({}, {"use_memory": False}):
        assert torch.equal(run(gated, ids, **options)[0], expected)
        _, states = run(gated, ids[:, :cut], **options)
        assert torch.equal(run(gated, ids[:, cut:], states, **options)[0], expected_rest)
    # With the gate open, use_memory=False still is the base.
    model = copy.deepcopy(model_of(case))
    if any(isinstance(module, AttendingMemory) for module in model.modules()):
        _only_attends(model, ids, cut)
        return
    assert not base.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert torch.equal(run(model, ids, use_memory=False)[0], run(base, ids)[0])


def _only_attends(model: MemLMForCausalLM, ids: Tensor, cut: int) -> None:
    expected, _ = run(model, ids, use_memory=False)
    first, states = run(model, ids[:, :cut], use_memory=False)
    second, _ = run(model, ids[:, cut:], states, use_memory=False)
    assert_close(torch.cat([first, second], 1), expected)
    # Other memories, kept or trained, make no difference.
    _, read = run(model, ids[:, :cut])
    attending = run(model, ids[:, :cut], use_memory=False)[1]
    swapped = attending | {name: read[name] for name in model.memory_state_names()}
    assert torch.equal(run(model, ids[:, cut:], swapped, use_memory=False)[0], second)
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            parameter += 1
    assert torch.equal(run(model, ids, use_memory=False)[0], expected)
    assert not torch.allclose(run(model, ids)[0], expected)


@torch.no_grad()
def causal(case: Case, data) -> None:
    """A token never changes an output before it."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    place = data.draw(st.integers(1, LENGTH - 1), label="place")
    changed = ids.clone()
    changed[:, place:] = 1 + ids[:, place:] % (VOCABULARY - 1)
    before, after = run(model, ids)[0], run(model, changed)[0]
    assert_close(after[:, :place], before[:, :place])
    assert not torch.allclose(after[:, place:], before[:, place:])


@torch.no_grad()
def acts(case: Case, data) -> None:
    """The branch matters; a memory with a state hands tokens on beyond the attention's reach."""
    model = model_of(case)
    ids = draw_ids(data, 1)
    logits, _ = run(model, ids)
    assert (logits - run(model, ids, use_memory=False)[0]).abs().amax() > 1e-3
    if not model.memory_state_names():
        return
    alone = variant_of(case, repeat=1)
    changed = ids.clone()
    changed[0, :4] = 1 + ids[0, :4] % (VOCABULARY - 1)
    far = slice(4 + WINDOW + 2, None)  # past the window and the convolution of the one attention
    difference = run(alone, ids)[0] - run(alone, changed)[0]
    assert difference[:, far].abs().amax() > 1e-6


@torch.no_grad()
def fork(case: Case, data) -> None:
    """States can be cloned, repeated, reordered, selected, saved and loaded."""
    model = model_of(case)
    ids = draw_ids(data, 3)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    _, states = run(model, ids[:, :cut])
    before = snapshot(states)
    rest = ids[:, cut:]
    expected, _ = run(model, rest, states)

    copies = {name: state.clone() for name, state in states.items()}
    run(model, rest.flip(0), copies)
    assert_same_bits(states, before)
    assert_same_bits({name: state.to("cpu").detach() for name, state in states.items()}, before)

    twice = {name: state.repeat(2) for name, state in states.items()}
    both, _ = run(model, torch.stack([rest, rest.roll(1, 0)], 1).flatten(0, 1), twice)
    assert_close(both[::2], expected)
    assert_close(both[1::2], run(model, rest.roll(1, 0), states)[0])

    order = torch.tensor(data.draw(st.permutations([0, 1, 2]), label="order"))
    for operation in ("select", "reorder"):
        moved = {name: getattr(state, operation)(order) for name, state in states.items()}
        assert_close(run(model, rest[order], moved)[0], expected[order])

    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for name, state in states.items():
            file = os.path.join(folder, f"{name}.safetensors")
            save_file(state.state_dict(), file)
            loaded[name] = type(state).from_state_dict(load_file(file))
    assert_same_bits(loaded, before)
    assert torch.equal(run(model, rest, loaded)[0], expected)


def read_only(case: Case, data) -> None:
    """No call changes the state it is given; without writing the same object comes back."""
    model = model_of(case)
    names = model.memory_state_names()
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    with torch.no_grad():
        _, states = run(model, ids[:, :cut])
    before = snapshot(states)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            run(model, ids[:, cut:], states)
            assert_same_bits(states, before)
            frozen, after = run(model, ids[:, cut:], states, write_memory=False)
            assert_same_bits(states, before)
            assert all(after[name] is states[name] for name in names)
            again, _ = run(model, ids[:, cut:], states, write_memory=False)
            assert torch.equal(frozen, again)
            _, after = run(model, ids[:, cut:], states, use_memory=False)
            assert_same_bits(states, before)
            assert all(after[name] is states[name] for name in names)


@torch.no_grad()
def bytes_(case: Case, data) -> None:
    """`nbytes` is what is allocated: no views into larger storages, nothing held twice."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    states = model.init_states(2)
    valid = torch.ones_like(ids)
    valid[0, : data.draw(st.integers(0, 5), label="padding")] = 0
    for piece in pieces(draw_cuts(data)):
        for name, state in states.items():
            storages = {}
            for tensor in state.tensors().values():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr() if storage.nbytes() else id(tensor)] = storage.nbytes()
            held = sum(storages.values())
            assert state.nbytes == held, f"{name}: nbytes {state.nbytes}, allocated {held}"
        _, states = run(model, ids[:, piece], states, attention_mask=valid[:, piece])
