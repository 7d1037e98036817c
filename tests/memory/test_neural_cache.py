"""The neural cache against a line-by-line version, by hand, and what its state holds."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlm.layers.context import CallContext, SequenceLayout
from memlm.memory.neural_cache import NeuralCache, NeuralCacheConfig
from memlm.memory.output_memory import BLOCK

SIZE, VOCABULARY = 6, 11


def build(hidden_size=SIZE, **options):
    return NeuralCache(
        NeuralCacheConfig(**{"weight": 0.3, "temperature": 0.7} | options), hidden_size
    )


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_ids(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def packed(lengths, ids, write=True):
    """A context of rows of documents of these lengths; 0 to the left is padding."""
    length = ids.shape[1]
    positions, valid = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, documents in enumerate(lengths):
        at = length - sum(documents)
        for count in documents:
            positions[row, at : at + count] = torch.arange(count)
            valid[row, at : at + count] = True
            at += count
    layout = SequenceLayout.build(positions, valid, valid & (positions == 0))
    return CallContext(layout, positions, write=write, input_ids=ids)


def slow(hidden, logits, ids, lengths, config):
    """p = (1 - weight) p_model + weight p_cache, token by token; padding is left as it is."""
    out = logits.clone()
    for row, documents in enumerate(lengths):
        at = len(ids[row]) - sum(documents)
        for count in documents:
            h = hidden[row, at : at + count].double()
            if config.metric == "cosine":
                h = h / h.norm(dim=-1, keepdim=True)
            x = ids[row, at : at + count].tolist()
            for t in range(1, count):
                scores = {
                    i: float(h[t] @ h[i]) / config.temperature
                    for i in range(max(0, t - config.capacity), t)
                }
                nearest = sorted(scores, key=scores.get, reverse=True)[: config.top_k]
                total = sum(math.exp(scores[i]) for i in nearest)
                cache = torch.zeros(VOCABULARY, dtype=torch.float64)
                for i in nearest:
                    cache[x[i + 1]] += math.exp(scores[i]) / total
                base = logits[row, at + t].double().softmax(-1)
                mixed = (1 - config.weight) * base + config.weight * cache
                out[row, at + t] = mixed.log()
            at += count
    return out


@pytest.mark.parametrize("options", [{}, {"metric": "dot"}, {"top_k": 2}, {"top_k": 4}])
@pytest.mark.parametrize("capacity", [4, 9, 30])
def test_against_the_slow_version(options, capacity):
    memory = build(capacity=capacity, **options)
    hidden, logits, ids = draw(3, 17, SIZE), draw(3, 17, VOCABULARY, seed=1), draw_ids(3, 17)
    lengths = [[17], [3, 9], [1, 1, 12, 2]]
    state = memory.init_state(3, dtype=torch.float64)
    mixed, _ = memory(hidden, logits, state, packed(lengths, ids))
    expected = slow(hidden, logits, ids, lengths, memory.config)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)


def test_blocks_of_a_long_call():
    """A call that is searched in many blocks equals the slow version, and one cut into pieces."""
    memory = build(capacity=50)
    length = 400
    hidden, ids = draw(1, length, SIZE), draw_ids(1, length)
    logits = draw(1, length, VOCABULARY, seed=1)
    mixed, _ = memory(hidden, logits, memory.init_state(1, dtype=torch.float64), plain(ids))
    expected = slow(hidden, logits, ids, [[length]], memory.config)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)


def plain(ids, first=0, **kwargs):
    return CallContext.plain(*ids.shape, first, input_ids=ids, **kwargs)


def test_by_hand():
    memory = build(2, capacity=8, metric="dot", temperature=1.0, weight=0.5)
    hidden = torch.tensor([[[math.log(2), 0.0], [0.0, 1.0], [1.0, math.log(3)]]])
    ids = torch.tensor([[5, 7, 9]])
    logits = torch.zeros(1, 3, 10)
    mixed, state = memory(hidden, logits, memory.init_state(1), plain(ids))
    p = mixed.softmax(-1)[0]
    # The second token has seen one pair: after h_0 came 7.
    torch.testing.assert_close(p[1, 7], torch.tensor(0.05 + 0.5))
    # The third has seen (h_0, 7) with weight 2 and (h_1, 9) with weight 3.
    torch.testing.assert_close(p[2, 7], torch.tensor(0.05 + 0.5 * 2 / 5))
    torch.testing.assert_close(p[2, 9], torch.tensor(0.05 + 0.5 * 3 / 5))
    assert state.written.tolist() == [2] and state.values[0][0, :2].tolist() == [7, 9]
    assert state.pending_position.tolist() == [2] and torch.equal(state.pending, hidden[:, 2])


def test_after_overflow_every_live_entry_is_found_and_no_other():
    """Hidden state i is the i-th axis: only the entry that is asked for has a share."""
    size, capacity, length = 40, 7, 30
    memory = build(size, capacity=capacity, metric="dot", temperature=0.01, weight=0.5)
    ids = torch.arange(length)[None]
    hidden = torch.eye(size)[None, :length]
    state = memory.init_state(1)
    for part in (slice(0, 11), slice(11, 12), slice(12, length)):
        context = plain(ids[:, part], part.start)
        state = memory(
            hidden[:, part], torch.zeros(1, part.stop - part.start, size), state, context
        )[1]
    # A question at position `length` for each of the entries.
    for entry in range(length - 1):
        question = plain(torch.zeros(1, 1, dtype=torch.int64), length, write=False)
        logits = torch.zeros(1, 1, size)
        p = memory(torch.eye(size)[None, entry : entry + 1], logits, state, question)[0].softmax(-1)
        # The newest hidden state still waits, so the ring reaches one further back.
        live = entry >= length - capacity
        expected = 0.5 / size + (0.5 if live else 0.0)
        torch.testing.assert_close(float(p[0, 0, entry + 1]), expected, rtol=0, atol=1e-6)


def test_unwritten_slots_are_never_attended():
    memory = build(capacity=20)
    ids, hidden, logits = draw_ids(2, 6), draw(2, 6, SIZE), draw(2, 6, VOCABULARY, seed=1)
    state = memory.init_state(2, dtype=torch.float64)
    # Whatever stands in the free slots.
    state.keys.fill_(1e3), state.values[0].fill_(VOCABULARY - 1), state.pending.fill_(1e3)
    mixed, after = memory(hidden, logits, state, plain(ids))
    expected = slow(hidden, logits, ids, [[6], [6]], memory.config)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
    assert after.valid.sum(1).tolist() == [5, 5]


def test_a_new_document_empties_the_cache():
    memory = build(capacity=20)
    ids, hidden, logits = draw_ids(2, 8), draw(2, 8, SIZE), draw(2, 8, VOCABULARY, seed=1)
    state = memory(hidden, logits, memory.init_state(2, dtype=torch.float64), plain(ids))[1]
    lengths = [[8], [5, 3]]
    mixed, after = memory(hidden, logits, state, packed(lengths, ids))
    expected = slow(hidden, logits, ids, lengths, memory.config)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
    assert after.written.tolist() == [7, 2]


def test_frozen_reads_the_given_entries_only():
    memory = build(capacity=20)
    ids, hidden, logits = draw_ids(1, 9), draw(1, 9, SIZE), draw(1, 9, VOCABULARY, seed=1)
    _, state = memory(
        hidden[:, :5], logits[:, :5], memory.init_state(1, dtype=torch.float64), plain(ids[:, :5])
    )
    context = plain(ids[:, 5:], 5, write=False)
    mixed, after = memory(hidden[:, 5:], logits[:, 5:], state, context)
    assert after is state
    # The first four pairs are known; a copy of each token alone, right after them, sees the same.
    for t in range(5, 9):
        known = torch.cat((hidden[:, :4], hidden[:, t : t + 1]), 1)
        read = torch.cat((ids[:, :4], ids[:, 4:5]), 1)
        given = torch.cat((logits[:, :4], logits[:, t : t + 1]), 1)
        expected = slow(known, given, read, [[5]], memory.config)[:, -1]
        torch.testing.assert_close(mixed[:, t - 5], expected, rtol=0, atol=1e-12)


def test_half_precision_states_are_searched_in_float32():
    memory = build(capacity=20)
    hidden = draw(1, 12, SIZE).bfloat16()
    ids, logits = draw_ids(1, 12), draw(1, 12, VOCABULARY, seed=1, dtype=torch.float32)
    state = memory.init_state(1, dtype=torch.bfloat16)
    mixed, after = memory(hidden, logits, state, plain(ids))
    assert after.keys.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    expected = slow(hidden.double(), logits, ids, [[12]], memory.config)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_memory_of_a_call_is_bounded():
    """No matrix of all tokens and all entries: the largest tensor of a long call is one block."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor):
                    self.numel = max(self.numel, part.untyped_storage().nbytes() // part.itemsize)
            return out

    memory = build(capacity=4000)
    length = 9000
    ids = draw_ids(1, length)
    hidden, logits = draw(1, length, SIZE).float(), torch.zeros(1, length, VOCABULARY)
    with torch.no_grad(), Largest() as largest:
        memory(hidden, logits, memory.init_state(1), plain(ids))
    assert largest.numel <= BLOCK < length * length / 10
