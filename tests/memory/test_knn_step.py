"""One token of the kNN cache in C++, as in decoding, against the same in torch."""

import pytest
import torch

from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.knn_step import native
from memlm.layers.context import SequenceLayout
from memlm.memory import CallContext, KnnCache, KnnCacheConfig
from memlm.memory.knn_retrieval import KnnCacheState, Retriever

pytestmark = pytest.mark.native(native.SOURCE)
HIDDEN = 32


def module(**options):
    torch.manual_seed(0)
    sizes = {"capacity": 8, "segment": 4, "key_size": 20, "top_k": 3, "num_heads": 2}
    memory = KnnCache(KnnCacheConfig(**{**sizes, **options}), HIDDEN)
    with torch.no_grad():
        memory.sink.copy_(torch.tensor([0.3, 1.2]))
        memory.place_bias.normal_()
        memory.compressor.norm.weight.normal_()
    return memory


def tokens(count, kinds=5):
    """Of a few kinds, so that equal states are stored."""
    return torch.randn(kinds, HIDDEN)[torch.randint(kinds, (1, count))]


def after(memory, length):
    """The state of one row of so many tokens; nothing is known of free slots."""
    state = memory.init_state(1)
    if length:
        _, state = memory(tokens(length), state, CallContext.plain(1, length))
    state.keys[~state.valid] = torch.nan
    state.positions[~state.valid] = 1
    return state


def rows(*states):
    named = [state.tensors() for state in states]
    return KnnCacheState.from_state_dict({n: torch.cat([x[n] for x in named]) for n in named[0]})


def step(positions):
    position_ids = torch.tensor(positions)[:, None]
    return CallContext(SequenceLayout.step(position_ids), position_ids)


def both(monkeypatch, call):
    """What torch and C++ return."""
    found = []
    for implementation in ("eager", "native"):
        monkeypatch.setenv(VARIABLE, f"auto,knn_step={implementation}")
        with torch.no_grad():
            found.append(call())
    return found


def check_step(memory, hidden, state, context, monkeypatch):
    """The state after a token that C++ took."""
    with torch.no_grad():
        z = memory.compressor(hidden)
        assert Retriever(memory.config, memory.compressor)._step(z, state, context) is not None
    retriever = Retriever(memory.config, memory.compressor)
    (found, new), (found_native, new_native) = both(
        monkeypatch, lambda: retriever.retrieve(hidden, state, context)
    )
    assert torch.equal(found_native.exists, found.exists)
    assert torch.equal(found_native.entries, found.entries)
    similarities = (part.similarity[found.exists] for part in (found_native, found))
    torch.testing.assert_close(*similarities, rtol=1e-6, atol=1e-6)
    for name, expected in new.tensors().items():
        error = 1e-6 if name == "recent_similarity" else 0
        torch.testing.assert_close(
            new_native.tensors()[name], expected, equal_nan=True, rtol=error, atol=error
        )
    (out, _), (out_native, _) = both(monkeypatch, lambda: memory(hidden, state, context))
    torch.testing.assert_close(out_native, out, rtol=1e-5, atol=1e-5)
    return new


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("neighborhood", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_rows_at_different_places(top_k, neighborhood, metric, monkeypatch):
    memory = module(top_k=top_k, neighborhood=neighborhood, metric=metric)
    with torch.no_grad():
        # Nothing stored; less than a ring; a ring that is full; two that went round.
        lengths = [0, 6, 8, 17, 30]
        state = rows(*(after(memory, length) for length in lengths))
        hidden = tokens(len(lengths)).transpose(0, 1)
        check_step(memory, hidden, state, step(lengths), monkeypatch)
        # One of them begins anew.
        state = state.reset(torch.tensor([False, False, True, False, True]))
        check_step(memory, hidden, state, step([0, 6, 0, 17, 0]), monkeypatch)


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_every_token_finds_what_torch_finds(metric, monkeypatch):
    memory = module(metric=metric, capacity=300, segment=64, top_k=16, neighborhood=2)
    with torch.no_grad():
        start = [700, 200, 64]
        lengths = [CallContext.plain(1, length) for length in start]
        states = [
            memory(tokens(length, 10**4), memory.init_state(1), context)[1]
            for length, context in zip(start, lengths, strict=True)
        ]
        state = rows(*states)
        for offset in range(40):
            hidden = tokens(3, 10**4).transpose(0, 1)
            context = step([position + offset for position in start])
            if any(position % 64 == 63 for position in context.position_ids.flatten().tolist()):
                _, state = memory(hidden, state, context)
            else:
                state = check_step(memory, hidden, state, context, monkeypatch)


def test_what_tokens_before_found(monkeypatch):
    memory = module(context=3, neighborhood=2, top_k=4)
    with torch.no_grad():
        state = rows(after(memory, 9), after(memory, 21))
        for offset in range(2):
            hidden = tokens(2).transpose(0, 1)
            state = check_step(memory, hidden, state, step([9 + offset, 21 + offset]), monkeypatch)


def test_empty_store_reads_exactly_zero(monkeypatch):
    memory = module()
    monkeypatch.setenv(VARIABLE, "auto")
    with torch.no_grad():
        out, _ = memory(tokens(1), after(memory, 0), step([0]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("position", [7, 9])
def test_torch_takes_the_end_of_a_segment_and_positions_that_jump(position, monkeypatch):
    memory = module()
    with torch.no_grad():
        state, hidden = after(memory, 7 if position == 7 else 6), tokens(1)
        retriever = Retriever(memory.config, memory.compressor)
        assert retriever._step(memory.compressor(hidden), state, step([position])) is None
        (out, new), (out_native, new_native) = both(
            monkeypatch, lambda: memory(hidden, state, step([position]))
        )
    torch.testing.assert_close(out_native, out, rtol=1e-5, atol=1e-5)
    assert torch.equal(new_native.pending_positions, new.pending_positions)


def test_what_it_refuses(monkeypatch):
    x = torch.randn(2, 3)
    assert native.refusal(x) == "it has no gradients and is not traced"
    with torch.no_grad():
        assert native.refusal(x, x) is None
        assert native.refusal(x, x.double()) == "it computes in float32"
        assert native.refusal(x, x.t()) == "it takes contiguous tensors"
        monkeypatch.setenv(VARIABLE, "eager")
        assert native.refusal(x) == "another implementation is forced"
