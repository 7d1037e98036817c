import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.layers.attention_weights import AttentionWeights
from memlm.layers.context import SequenceLayout
from memlm.memory import CallContext, KnnCache, KnnCacheConfig
from memlm.memory.knn_retrieval import Compressor, Retriever

SIZES = {"capacity": 8, "segment": 4, "key_size": 6, "top_k": 3, "num_heads": 2}


def module(**options):
    torch.manual_seed(0)
    memory = KnnCache(KnnCacheConfig(**{**SIZES, **options}), hidden_size=16).double()
    with torch.no_grad():
        memory.sink.copy_(torch.tensor([0.3, 1.2]))
        memory.place_bias.normal_()
    return memory


def new_state(memory, batch_size=1):
    return memory.init_state(batch_size, dtype=torch.float64)


def similarity(metric, query, key):
    """On the scale of a cosine for every metric."""
    if metric == "cosine":
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return query @ key
    dot = query @ key if metric == "dot" else 2 * query @ key - key @ key
    return dot / len(key)


def expected_reads(memory, hidden):
    """For each token of one row what it finds, (position, score of its hit, place), by its store.

    One document from position 0, straight from the descriptions of the config.
    """
    config = memory.config
    z = memory.compressor(hidden)
    # Hits are ranked by states rounded to a grid, of unit length or unit scale.
    scaled = F.normalize(z, dim=-1) if config.metric == "cosine" else z / memory.key_size**0.5
    scaled = (1024 * scaled.detach()).round()
    ranking = {"cosine": "dot"}.get(config.metric, config.metric)
    before = (config.neighborhood - 1) // 2
    reads, last_used = [], {}
    for p in range(hidden.shape[0]):
        boundary = p // config.segment * config.segment
        visible = range(max(0, boundary - config.capacity), boundary)
        if config.eviction == "lru":
            if p == boundary:
                for token in range(max(0, p - config.segment), p):
                    last_used.update({j: p for j, _, _ in reads[token]})
                for j in range(max(0, p - config.segment), p):
                    if len(last_used) == config.capacity:
                        del last_used[min(last_used, key=lambda old: (last_used[old], old))]
                    last_used[j] = p
            visible = sorted(last_used)
        rank = {j: float(similarity(ranking, scaled[p], scaled[j])) for j in visible}
        hits = sorted(visible, key=lambda j, rank=rank: -rank[j])[: config.top_k]
        reads.append(
            [
                (hit + place - before, similarity(config.metric, z[p], z[hit]), place)
                for hit in hits
                for place in range(config.neighborhood)
                if hit + place - before in visible
            ]
        )
    return reads


def expected_output(memory, hidden):
    """One row, one document from position 0, straight from the class's description."""
    config, heads = memory.config, memory.num_heads
    z = memory.compressor(hidden)
    reads = expected_reads(memory, hidden)
    rows = []
    for p in range(hidden.shape[0]):
        q = memory.q_proj(hidden[p]).view(heads, -1)
        out = []
        for h in range(heads):
            logits, values = [memory.sink[h]], [torch.zeros_like(q[h])]
            for step in range(min(config.context, p + 1)):
                for j, score, place in reads[p - step]:
                    k = memory.k_proj(z[j]).view(heads, -1)[h]
                    logit = q[h] @ k / math.sqrt(len(k)) + memory.log_temperature[h].exp() * score
                    bias = memory.place_bias[h, step * config.neighborhood + place]
                    logits.append(logit + bias)
                    values.append(memory.v_proj(z[j]).view(heads, -1)[h])
            out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
        rows.append(memory.o_proj(torch.cat(out)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neighborhood": 1, "metric": "dot"},
        {"neighborhood": 3, "metric": "l2"},
        {"neighborhood": 4, "segment": 3, "capacity": 7},
        {"segment": 1, "capacity": 5},
        {"top_k": 8},
        {"context": 2},
        {"context": 6, "head_size": 5, "neighborhood": 1},
        {"reproject": True},
        {"eviction": "lru"},
        {"eviction": "lru", "neighborhood": 3, "segment": 3, "capacity": 7, "context": 2},
    ],
    ids=str,
)
def test_output_is_the_description(options):
    memory = module(**options)
    hidden = torch.randn(29, 16, dtype=torch.float64)
    out, _ = memory(hidden[None], new_state(memory), CallContext.plain(1, 29))
    torch.testing.assert_close(out[0], expected_output(memory, hidden))
    # Nothing is visible in the first segment: exactly zero, whatever the sink.
    assert torch.equal(out[0, : memory.config.segment], 0 * out[0, : memory.config.segment])


def test_state_holds_complete_segments_and_what_waits():
    memory = module()
    hidden = torch.randn(1, 30, 16, dtype=torch.float64)
    z = memory.compressor(hidden)
    state, seen = new_state(memory), 0
    for length in (3, 1, 1, 9, 16):
        part = hidden[:, seen : seen + length]
        _, state = memory(part, state, CallContext.plain(1, length, first_position=seen))
        seen += length
        complete = seen // 4 * 4
        kept = list(range(max(0, complete - 8), complete))
        waiting = list(range(complete, seen))
        slots = torch.tensor(kept, dtype=torch.int64) % 8
        assert state.written.tolist() == [complete] and state.valid.sum() == len(kept)
        assert state.positions[0, slots].tolist() == kept
        assert state.pending_positions[0].tolist() == [-1] * (4 - len(waiting)) + waiting
        torch.testing.assert_close(state.keys[0, slots], z[0, kept])
        torch.testing.assert_close(state.pending[0, 4 - len(waiting) :], z[0, waiting])


def test_the_store_is_copied_only_when_a_segment_completes():
    memory = module()
    hidden = torch.randn(2, 12, 16, dtype=torch.float64)
    _, state = memory(hidden[:, :9], new_state(memory, 2), CallContext.plain(2, 9))
    _, waiting = memory(hidden[:, 9:11], state, CallContext.plain(2, 2, first_position=9))
    assert waiting.keys is state.keys and waiting.positions is state.positions
    _, moved = memory(hidden[:, 11:], waiting, CallContext.plain(2, 1, first_position=11))
    assert moved.keys is not state.keys
    assert sorted(moved.positions[0].tolist()) == list(range(4, 12))


def test_an_entry_counts_by_its_position_not_by_its_content():
    memory = module(top_k=4, neighborhood=1)
    hidden = torch.randn(1, 6, 16, dtype=torch.float64)
    _, state = memory(hidden[:, :5], new_state(memory), CallContext.plain(1, 5))

    def read(**changed):
        context = CallContext.plain(1, 1, first_position=5)
        return memory(hidden[:, 5:], dataclasses.replace(state, **changed), context)[0]

    assert state.valid[0].tolist() == [True] * 4 + [False] * 4
    nothing = torch.zeros(1, 1, 16, dtype=torch.float64)
    assert torch.equal(read(written=torch.zeros_like(state.written)), nothing)
    keys = state.keys.clone()
    keys[:, 4:] = torch.nan  # slots that were never written
    assert torch.equal(read(keys=keys), read())
    empty = {"keys": torch.full_like(keys, torch.nan), "written": torch.zeros_like(state.written)}
    assert torch.equal(read(**empty), nothing)
    (read(keys=keys) + read(**empty)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in memory.parameters())
    keys = state.keys.clone()
    keys[:, 2:4] = 0  # two of the four entries
    # Entries of zeros add nothing but take their share of the attention.
    assert not torch.allclose(read(keys=keys), read(keys=keys, written=state.written - 2))


def test_gradient_reaches_what_was_stored_in_this_call():
    memory = module()
    hidden = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    out, _ = memory(hidden, new_state(memory), CallContext.plain(1, 8))
    (gradient,) = torch.autograd.grad(out[0, 5].sum(), hidden, retain_graph=True)
    assert (gradient[0, :4].abs().sum(-1) > 0).sum() >= 3  # the hits and their neighbours
    assert gradient[0, 4].abs().sum() == gradient[0, 6:].abs().sum() == 0
    out.square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
def test_after_overflow_every_live_entry_is_found_and_no_other(eviction):
    memory = module(top_k=1, neighborhood=1, eviction=eviction)
    hidden = torch.randn(1, 40, 16, dtype=torch.float64)
    z, state, seen = memory.compressor(hidden)[0], new_state(memory), 0
    for length in (4, 4, 1, 11, 20):
        part = hidden[:, seen : seen + length]
        _, state = memory(part, state, CallContext.plain(1, length, first_position=seen))
        seen += length
        live = sorted(state.positions[0, state.valid[0]].tolist())
        context = CallContext.plain(1, 40, first_position=seen, write=False)
        context.position_ids = torch.full((1, 40), seen // 4 * 4)
        found, same = Retriever(memory.config, memory.compressor).retrieve(hidden, state, context)
        assert same is state
        own = torch.isclose(found.entries[0, :, 0], z).all(-1) & found.exists[0, :, 0]
        assert own.nonzero().squeeze(1).tolist() == live
        assert len(live) == min(8, seen // 4 * 4)
        if eviction == "fifo":
            assert live == list(range(max(0, seen // 4 * 4 - 8), seen // 4 * 4))


def test_what_is_read_again_and_again_outlives_what_is_not():
    torch.manual_seed(1)
    hidden = torch.randn(1, 64, 16, dtype=torch.float64)
    hidden[:, 7::4] = hidden[:, 0]  # every segment asks for the first token
    for eviction, kept in (("fifo", False), ("lru", True)):
        memory = module(top_k=1, neighborhood=1, eviction=eviction)
        _, state = memory(hidden, new_state(memory), CallContext.plain(1, 64))
        assert (0 in state.positions[0].tolist()) == kept


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
def test_the_compressor_learns_from_what_earlier_calls_stored(eviction):
    hidden = torch.randn(1, 11, 16, dtype=torch.float64)
    context = CallContext.plain(1, 3, first_position=8)
    outputs = []
    for reproject in (False, True):
        memory = module(reproject=reproject, eviction=eviction)
        retriever = Retriever(memory.config, memory.compressor)
        with torch.no_grad():
            _, state = memory(hidden[:, :8], new_state(memory), CallContext.plain(1, 8))
        outputs.append(memory(hidden[:, 8:], state, context)[0])
        found, _ = retriever.retrieve(hidden[:, 8:], state, context)
        assert found.entries.requires_grad == reproject
        # What is read is what the compressor makes now, not what it made when it was stored.
        with torch.no_grad():
            memory.compressor.norm.weight.mul_(2.0)
        found, _ = retriever.retrieve(hidden[:, 8:], state, context)
        now = memory.compressor(hidden[0, :8]) if reproject else state.keys[0]
        distance = (found.entries[found.exists][:, None] - now).abs().amax(-1)
        assert distance.amin(-1).max() < 1e-12
    torch.testing.assert_close(*outputs)


def test_the_store_can_have_a_type_of_its_own():
    hidden = torch.randn(2, 30, 16, dtype=torch.float64)
    memory = module(store_dtype="float16", reproject=True, context=2)
    state = new_state(memory, 2)
    assert state.keys.dtype == state.pending.dtype == torch.float16
    assert state.values[0].dtype == torch.float64
    whole, _ = memory(hidden, state, CallContext.plain(2, 30))
    parts, seen = [], 0
    for length in (3, 1, 1, 9, 16):
        context = CallContext.plain(2, length, first_position=seen)
        out, state = memory(hidden[:, seen : seen + length], state, context)
        parts.append(out)
        seen += length
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    # Rounding is all that it costs.
    exact, _ = module(context=2)(hidden, new_state(module(context=2), 2), CallContext.plain(2, 30))
    assert 0 < (whole - exact).abs().max() < 0.01 * exact.abs().max()
    with torch.no_grad():
        read, _ = memory(hidden, new_state(memory, 2), CallContext.plain(2, 30))
    torch.testing.assert_close(read, whole)


def test_starts_from_the_attention_of_its_layer():
    torch.manual_seed(3)
    weights = AttentionWeights(
        *(torch.randn(rows, 16).double() for rows in (24, 12, 12)),
        torch.randn(16, 24).double(),
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
    )
    config = KnnCacheConfig(key_size=6).for_attention(weights)
    assert (config.num_heads, config.head_size) == (4, 6)
    memory = KnnCache(config, hidden_size=16).double()
    memory.init_from_attention(weights)
    hidden = torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(memory.q_proj(hidden), weights.q @ hidden)
    torch.testing.assert_close(memory.o_proj.weight, weights.o)
    state = torch.randn(6, dtype=torch.float64)
    as_hidden = F.pad(state, (0, 10))  # a state stands for the first channels
    for projection, weight in ((memory.k_proj, weights.k), (memory.v_proj, weights.v)):
        heads = (weight @ as_hidden).view(2, 6)[[0, 0, 1, 1]]
        torch.testing.assert_close(projection(state), heads.flatten())
    given = KnnCacheConfig(num_heads=2)
    assert given.for_attention(weights) is given
    other = KnnCache(given, hidden_size=16).double()
    before = other.q_proj.weight.clone()
    other.init_from_attention(weights)  # of other sizes
    assert torch.equal(other.q_proj.weight, before)


def test_reading_without_writing_sees_what_writing_saw():
    memory = module()
    hidden = torch.randn(2, 12, 16, dtype=torch.float64)
    _, state = memory(hidden[:, :10], new_state(memory, 2), CallContext.plain(2, 10))
    written, _ = memory(hidden[:, 10:], state, CallContext.plain(2, 2, first_position=10))
    context = CallContext.plain(2, 2, first_position=10, write=False)
    read, same = memory(hidden[:, 10:], state, context)
    assert same is state
    torch.testing.assert_close(read, written)
    # Past the next boundary the entries that waited are visible too, those of the call are not.
    far, _ = memory(hidden[:, 10:], state, CallContext.plain(2, 2, first_position=12, write=False))
    assert not torch.allclose(far, read)
    empty, _ = memory(hidden, new_state(memory, 2), CallContext.plain(2, 12, write=False))
    assert torch.equal(empty, torch.zeros_like(empty))


def test_a_row_without_tokens_keeps_its_state():
    memory = module()
    hidden = torch.randn(2, 10, 16, dtype=torch.float64)
    _, state = memory(hidden, new_state(memory, 2), CallContext.plain(2, 10))
    positions = torch.arange(10, 16).expand(2, -1)
    valid = torch.tensor([[False] * 6, [True] * 6])
    layout = SequenceLayout.build(positions, valid, torch.zeros_like(valid))
    _, after = memory(hidden[:, :6], state, CallContext(layout, positions))
    for name, tensor in after.tensors().items():
        assert torch.equal(tensor[0], state.tensors()[name][0]), name
    assert after.positions[1].tolist() == list(range(8, 16)) and after.written[1] == 16
    nothing, same = memory(hidden[:, :0], state, CallContext.plain(2, 0, first_position=10))
    assert nothing.shape == (2, 0, 16) and same is state


@pytest.mark.parametrize("options", [{}, {"context": 4}, {"eviction": "lru"}], ids=str)
def test_a_packed_document_replaces_the_carried_one(options):
    memory = module(**options)
    hidden = torch.randn(1, 19, 16, dtype=torch.float64)
    _, state = memory(hidden[:, :7], new_state(memory), CallContext.plain(1, 7))
    # Two tokens more of the carried document, then one of three and one of seven tokens.
    positions = torch.tensor([[7, 8, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]])
    valid = torch.ones_like(positions, dtype=torch.bool)
    layout = SequenceLayout.build(positions, valid, positions == 0)
    out, after = memory(hidden[:, 7:], state, CallContext(layout, positions))
    alone, alone_state = memory(hidden[:, 12:], new_state(memory), CallContext.plain(1, 7))
    torch.testing.assert_close(out[:, 5:], alone)
    assert torch.equal(after.valid, alone_state.valid)
    assert torch.equal(after.pending_positions, alone_state.pending_positions)
    for part in ("keys", "positions"):
        rows = (getattr(each, part)[each.valid] for each in (after, alone_state))
        torch.testing.assert_close(*rows)
    torch.testing.assert_close(after.pending, alone_state.pending)
    assert torch.equal(out[:, 2:5], torch.zeros_like(out[:, 2:5]))
    carried, _ = memory(hidden[:, 7:9], state, CallContext.plain(1, 2, first_position=7))
    torch.testing.assert_close(out[:, :2], carried)


def test_equal_states_are_found_oldest_first():
    memory = module(capacity=16, top_k=2, neighborhood=2)
    torch.manual_seed(1)
    words = torch.randn(3, 16, dtype=torch.float64)
    # "0 1" twice, then "0 2" often: a query "0" has many equal hits with different successors.
    text = torch.tensor([0, 1, 0, 1, 0, 2, 0, 2, 0, 2, 0, 2, 0])
    hidden = words[text][None]
    out, _ = memory(hidden, new_state(memory), CallContext.plain(1, 13))
    torch.testing.assert_close(out[0], expected_output(memory, hidden[0]))
    first, state = memory(hidden[:, :12], new_state(memory), CallContext.plain(1, 12))
    second, _ = memory(hidden[:, 12:], state, CallContext.plain(1, 1, first_position=12))
    torch.testing.assert_close(torch.cat((first, second), 1), out)


def shared_model():
    torch.manual_seed(0)
    memory = {"type": "knn_cache", **SIZES, "share": "states"}
    mixer = {"type": "sliding_attention", "window": 4, "num_heads": 2}
    layers = [{"repeat": 3, "mixer": mixer, "memory": memory, "ffn": "swiglu"}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=30, hidden_size=16, layers=layers))


def test_layers_share_one_search(monkeypatch):
    from memlm.retrieval import vector_store

    model, calls = shared_model(), []
    search = vector_store.topk_search
    monkeypatch.setattr(
        vector_store,
        "topk_search",
        lambda *args, **kwargs: calls.append(1) or search(*args, **kwargs),
    )
    ids = torch.randint(30, (2, 13))
    out = model(ids, labels=ids, return_memory_states=True)
    assert len(calls) == 1
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    compressors = [part for part in model.modules() if isinstance(part, Compressor)]
    assert len(compressors) == 1
    sizes = [out.memory_states[name].nbytes for name in model.memory_state_names()]
    # The others have the counters of two rows and no slots.
    assert sizes[0] > 900 and sizes[1:] == [48, 48]


def test_default_sizes():
    config = KnnCacheConfig()
    assert config.sizes(1024) == (256, 16, 64)
    assert config.sizes(32) == (8, 1, 32)
    memory = module()
    assert memory.flops(8) == 2 * 8 * (2 * 16 * 16 + 3 * 16 * 6 + 8 * 6 + 2 * 2 * 3 * 2 * 6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"segment": 0}, "segment is 0"),
        ({"key_size": 0}, "key_size is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"neighborhood": 0}, "neighborhood is 0"),
        ({"top_k": 9}, "top_k 9 is more than capacity 8"),
        ({"segment": 9}, "segment 9 is more than capacity 8"),
        ({"neighborhood": 9}, "neighborhood 9 is more than capacity 8"),
        ({"context": 0}, "context is 0"),
        ({"head_size": 0}, "head_size is 0"),
        ({"num_heads": 3}, "num_heads 3 does not divide the hidden size 16"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        module(**options)
