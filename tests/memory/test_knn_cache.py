import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.layers.context import SequenceLayout
from memlm.memory import CallContext, KnnCache, KnnCacheConfig

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


def expected_output(memory, hidden):
    """One row, one document from position 0, straight from the class's description."""
    config, heads = memory.config, memory.num_heads
    z = memory.compressor(hidden)
    # Hits are ranked by states rounded to a grid, of unit length or unit scale.
    scaled = F.normalize(z, dim=-1) if config.metric == "cosine" else z / memory.key_size**0.5
    scaled = (1024 * scaled.detach()).round()
    ranking = {"cosine": "dot"}.get(config.metric, config.metric)
    before = (config.neighborhood - 1) // 2
    rows = []
    for p in range(hidden.shape[0]):
        boundary = p // config.segment * config.segment
        visible = range(max(0, boundary - config.capacity), boundary)
        rank = {j: float(similarity(ranking, scaled[p], scaled[j])) for j in visible}
        hits = sorted(visible, key=lambda j, rank=rank: -rank[j])[: config.top_k]
        q = memory.q_proj(hidden[p]).view(heads, -1)
        out = []
        for h in range(heads):
            logits, values = [memory.sink[h]], [torch.zeros_like(q[h])]
            for hit in hits:
                for place in range(config.neighborhood):
                    j = hit + place - before
                    if j in visible:
                        k = memory.k_proj(z[j]).view(heads, -1)[h]
                        logit = q[h] @ k / math.sqrt(len(k))
                        score = similarity(config.metric, z[p], z[hit])
                        logit = logit + memory.log_temperature[h].exp() * score
                        logits.append(logit + memory.place_bias[h, place])
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
    ],
    ids=str,
)
def test_output_is_the_description(options):
    memory = module(**options)
    hidden = torch.randn(21, 16, dtype=torch.float64)
    out, _ = memory(hidden[None], new_state(memory), CallContext.plain(1, 21))
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
    keys[:, 4:] = hidden.new_tensor(1e6)  # slots that were never written
    assert torch.equal(read(keys=keys), read())
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


def test_a_packed_document_replaces_the_carried_one():
    memory = module()
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
    from memlm.memory import knn_cache
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
    compressors = [part for part in model.modules() if isinstance(part, knn_cache.Compressor)]
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
        ({"num_heads": 3}, "num_heads 3 does not divide the hidden size 16"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        module(**options)
