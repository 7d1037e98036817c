import dataclasses

import pytest
import torch

from memlm.errors import UserError
from memlm.retrieval.vector_store import ValueSpec, VectorStore

CAPACITY, SIZE = 6, 4


def store(batch_size=2, eviction="fifo", values=()):
    return VectorStore.empty(
        batch_size, CAPACITY, SIZE, dtype=torch.float32, values=values, eviction=eviction
    )


def entries(positions, seed=0):
    """Keys that depend on the row and the position alone, on a grid: scores are exact."""
    torch.manual_seed(seed)
    table = torch.randint(-9, 10, (4, 64, SIZE)).float()
    rows = torch.arange(positions.shape[0])[:, None]
    return table[rows, positions]


def rows_of(*rows):
    return torch.tensor(rows)


def test_after_overflow_every_live_entry_is_found_and_no_other():
    state = store(1)
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(1, 40, SIZE), dim=-1)
    for start, stop in ((0, 4), (4, 5), (5, 15), (15, 40)):
        at = torch.arange(start, stop)[None]
        state = state.write(keys[:, start:stop], at)
        live = torch.arange(max(0, stop - CAPACITY), stop)
        scores, slots = state.search(keys[:, live], CAPACITY)
        assert state.positions[0, slots[0, :, 0]].tolist() == live.tolist()  # each finds itself
        count = len(live)
        assert all(
            sorted(row[:count].tolist()) == sorted(set(row[:count].tolist())) for row in slots[0]
        )
        assert (slots[0, :, count:] == -1).all() and (scores[0, :, count:] == -torch.inf).all()


def test_content_of_unwritten_slots_means_nothing():
    state = store().write(entries(rows_of([0, 1], [0, 1])), rows_of([0, 1], [0, 1]))
    queries = torch.ones(2, 3, SIZE)
    expected = state.search(queries, 4)
    dirty = state.keys.clone()
    dirty[:, 2:] = 1e6
    changed = dataclasses.replace(state, keys=dirty, positions=state.positions + 0)
    for mine, theirs in zip(changed.search(queries, 4), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_writes_are_idempotent_by_position():
    at = rows_of([0, 1, 2, 3], [0, 1, 2, 3])
    once = store().write(entries(at), at)
    again = once.write(entries(at, seed=1), at)
    overlapping = once.write(entries(at + 2), at + 2)
    for name, tensor in once.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    assert overlapping.written.tolist() == [6, 6]
    straight = once.write(entries(at[:, :2] + 4), at[:, :2] + 4)
    for name, tensor in straight.tensors().items():
        assert torch.equal(overlapping.tensors()[name], tensor), name


def test_any_split_gives_the_same_store():
    at = torch.arange(17).expand(2, -1)
    whole = store().write(entries(at), at)
    parts = store()
    for part in at.split([1, 7, 2, 7], dim=1):
        parts = parts.write(entries(part), part)
    for name, tensor in whole.tensors().items():
        assert torch.equal(parts.tensors()[name], tensor), name


def test_rows_advance_each_for_itself():
    at = rows_of([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 0, 0, 0, 0])
    valid = rows_of([True] * 8, [True] * 3 + [False] * 5)
    state = store().write(entries(at), at, valid=valid)
    assert state.written.tolist() == [8, 3] and state.start.tolist() == [2, 0]
    assert state.newest[:, 1].tolist() == [7, 2]
    queries = entries(rows_of([5], [1]))
    alone = [
        store(1).write(entries(at)[row : row + 1, :n], at[row : row + 1, :n])
        for row, n in ((0, 8), (1, 3))
    ]
    scores, slots = state.search(queries, 3)
    for row, single in enumerate(alone):
        expected = single.search(queries[row : row + 1], 3)
        assert torch.equal(scores[row], expected[0][0])
        assert torch.equal(slots[row], expected[1][0])
    reset = state.reset(torch.tensor([True, False]))
    assert (reset.search(queries, 3)[1][0] == -1).all()
    assert torch.equal(reset.search(queries, 3)[1][1], slots[1])
    assert torch.equal(
        state.select(torch.tensor([1, 0])).search(queries.flip(0), 3)[0][1], scores[0]
    )


@pytest.mark.parametrize("written", [4, 6, 9, 12])
def test_equal_scores_are_found_oldest_first(written):
    """Rows at the same place of the ring, and at different ones."""
    at = torch.arange(written).expand(2, -1)
    keys = torch.ones(2, written, SIZE)
    live = list(range(max(0, written - CAPACITY), written))
    together = store().write(keys, at)
    ahead = together.write(keys[:, :1], at[:, -1:] + 1, valid=rows_of([True], [False]))
    for state, row in ((together, 0), (together, 1), (ahead, 1)):
        _, slots = state.search(torch.ones(2, 1, SIZE), 3)
        assert state.positions[row, slots[row, 0]].tolist() == live[:3]


def test_documents_and_ranges_of_positions():
    at = rows_of([0, 1, 2, 0, 1], [0, 1, 2, 3, 4])
    documents = rows_of([0, 0, 0, 1, 1], [0, 0, 0, 0, 0])
    state = store().write(entries(at), at, documents)
    queries = torch.zeros(2, 2, SIZE)  # all scores are equal
    asked = rows_of([0, 1], [0, 1])
    _, slots = state.search(queries, 6, documents=asked)
    assert slots[0, 0, :4].tolist() == [0, 1, 2, -1] and slots[0, 1, :3].tolist() == [3, 4, -1]
    assert slots[1, 0, :6].tolist() == [0, 1, 2, 3, 4, -1] and (slots[1, 1] == -1).all()
    first, last = rows_of([1, 0], [1, 3]), rows_of([3, 1], [2, 9])
    _, slots = state.search(queries, 3, first=first, last=last, documents=documents[:, 2:4])
    assert slots.tolist() == [[[1, 2, -1], [3, -1, -1]], [[1, -1, -1], [3, 4, -1]]]


def test_the_bytes_are_known_before():
    values = (ValueSpec((3, 2), torch.float16), ValueSpec((), torch.int32))
    for eviction in ("fifo", "lru"):
        state = store(3, eviction, values)
        needed = VectorStore.bytes_of(3, CAPACITY, SIZE, torch.float32, values, eviction)
        assert state.nbytes == needed
        within = (3, SIZE, torch.float32, values, eviction)
        assert VectorStore.capacity_within(needed, *within) == CAPACITY
        assert VectorStore.capacity_within(needed - 1, *within) == CAPACITY - 1
    with pytest.raises(UserError, match="a budget of 50 bytes does not hold one entry per row"):
        VectorStore.capacity_within(50, 1, SIZE, torch.float32)


def test_values_stay_with_their_keys():
    at = torch.arange(9).expand(2, -1)
    state = store(values=(ValueSpec((2,), torch.float32), ValueSpec((), torch.int64)))
    tens = 10 * at + rows_of([0], [1])
    state = state.write(entries(at), at, values=(torch.stack((at, -at), -1).float(), tens))
    _, slots = state.search(entries(rows_of([7], [4])), 1)
    keys, pairs, numbers = state.take(slots)
    assert torch.equal(keys, entries(state.positions.gather(1, slots[:, 0]))[:, :, None])
    assert torch.equal(pairs[..., 0].long() * 10 + rows_of([[0]], [[1]]), numbers)
    forked = type(state).from_state_dict(state.state_dict())
    assert torch.equal(forked.take(slots)[2], numbers)


def test_gradients_reach_what_is_stored():
    at = torch.arange(9)[None]
    keys = torch.randn(1, 9, SIZE, requires_grad=True)
    state = store(1).write(keys, at)
    state.keys.sum().backward()
    assert keys.grad[0, :3].abs().sum() == 0 and (keys.grad[0, 3:] == 1).all()


def test_least_recently_used_entries_go_first():
    at = torch.arange(6)[None]
    state = store(1, "lru").write(entries(at), at, time=torch.tensor([0]))
    state = state.touch(torch.tensor([[0, 2, -1]]), torch.tensor([1]))
    state = state.touch(torch.tensor([[0]]), torch.tensor([2]))
    state = state.write(entries(at + 6)[:, :4], at[:, :4] + 6, time=torch.tensor([3]))
    assert state.positions[0].tolist() == [0, 6, 2, 7, 8, 9]
    state = state.write(entries(at[:, :1] + 10), at[:, :1] + 10, time=torch.tensor([4]))
    assert state.positions[0].tolist() == [0, 6, 10, 7, 8, 9]
    assert state.written.tolist() == [11] and bool(state.valid.all())


def test_padding_and_documents_without_entries_find_nothing():
    at = rows_of([0, 1, 2])
    state = store(1).write(entries(at), at, rows_of([0, 0, 2]))
    asked = rows_of([-1, 1, 3, 2])
    _, slots = state.search(torch.ones(1, 4, SIZE), 6, documents=asked)
    assert (slots[0, :3] == -1).all()
    assert slots[0, 3].tolist() == [2, -1, -1, -1, -1, -1]


def test_documents_and_positions_may_be_any_numbers():
    """Such that their product exceeds what an int64 holds."""
    at = rows_of([1 << 40, 1 << 40, 0])
    documents = rows_of([0, 1 << 24, 1 << 62])
    for eviction in ("fifo", "lru"):
        state = store(1, eviction).write(torch.ones(1, 3, SIZE), at, documents)
        _, slots = state.search(torch.ones(1, 3, SIZE), 2, documents=documents)
        assert slots.tolist() == [[[0, -1], [1, -1], [2, -1]]]
    keys = torch.ones(1, CAPACITY - 1, SIZE)
    later = torch.full((1, CAPACITY - 1), 1 << 62)
    full = state.write(keys, torch.arange(1, CAPACITY)[None], later)
    assert full.documents[0].tolist() == [1 << 62] * CAPACITY


def test_nothing_is_written_to_no_slots_and_found_there():
    empty = VectorStore.empty(2, 0, SIZE, dtype=torch.float32)
    state = empty.write(torch.ones(2, 3, SIZE), torch.arange(3).expand(2, -1))
    assert state.written.tolist() == [3, 3]
    for documents in (None, torch.zeros(2, 1, dtype=torch.int64)):
        scores, slots = state.search(torch.ones(2, 1, SIZE), 2, documents=documents)
        assert (slots == -1).all() and (scores == -torch.inf).all()
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert store().write(torch.ones(2, 0, SIZE), none).written.tolist() == [0, 0]


def test_keys_of_whole_numbers_are_refused():
    with pytest.raises(UserError, match="keys of torch.int8 would lose what they are"):
        VectorStore.empty(1, CAPACITY, SIZE, dtype=torch.int8)


def test_an_unknown_eviction_is_refused():
    with pytest.raises(UserError, match="eviction 'lru2' is not one of fifo, lru; .*lru"):
        store(eviction="lru2")
