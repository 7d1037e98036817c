"""How the backward pass of the loss without logits is cut, and the memory that it takes."""

import itertools

import pytest
import torch

from benchmarks.library import peak_allocated
from memlm.cuda import linear_cross_entropy
from memlm.cuda.dispatch import interpreting
from memlm.cuda.linear_cross_entropy.triton_chunks import PART, Product

PROGRAMS = 264


def product(rows, others, D, *, row_tile=128, other_tile=256, lent_rows=None):
    """Of `rows` rows, sums over `others`, in 16 bits; lent_rows: of the other result."""
    return Product(
        row_tile=row_tile,
        terms=-(-others // other_tile),
        columns=-(-D // other_tile),
        held=row_tile * -(-others // other_tile) * other_tile * 2,
        sums=4 * row_tile * D,
        row=2 * D,
        lent=None if lent_rows is None else lent_rows * D * 2,
        own=rows * others * 2 // 128,
        programs=PROGRAMS,
    )


def chunks(one, rows):
    """First row, rows, row tiles and parts of each."""
    found, first = [], 0
    while first < rows:
        tiles, parts = one.chunk(rows - first)
        size = min(tiles * one.row_tile, rows - first)
        found.append((first, size, tiles, parts))
        first += size
    return found


def span(tensor):
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize(
    "rows, others, D", [(1, 1, 3), (700, 300, 64), (999, 500, 700), (640, 1280, 7)]
)
@pytest.mark.parametrize("lent_rows", [None, 1, 300, 4000])
def test_chunks_lie_in_what_is_not_yet_written(rows, others, D, lent_rows):
    one = product(rows, others, D, row_tile=16, other_tile=32, lent_rows=lent_rows)
    result = torch.empty(rows * one.row, dtype=torch.uint8)
    other = torch.empty(one.lent or 0, dtype=torch.uint8)
    own = torch.empty(one.own_bytes, dtype=torch.uint8)
    for first, size, tiles, parts in chunks(one, rows):
        assert tiles == -(-size // 16) and 1 <= parts <= max(1, one.terms // PART)
        lent = result[(first + size) * one.row :] if lent_rows is None else other
        places = one.places(lent, own, tiles, parts, size)
        sums = 0 if parts == 1 else parts * size * D * 4
        assert [place.nbytes for place in places] == [tiles * one.held, sums]
        places = sorted(span(place) for place in places if len(place))
        for begin, end in places:
            assert any(a <= begin and end <= b for a, b in (span(lent), span(own)))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))


def full(one, rows):
    """The part of the rows whose products fill the card."""
    found = chunks(one, rows)
    return (
        sum(size for _, size, tiles, parts in found if tiles * one.columns * parts >= PROGRAMS)
        / rows
    )


@pytest.mark.parametrize(
    "tokens, entries, D, least",
    [(4096, 131072, 512, 0.4), (8192, 131072, 2048, 0.8), (8192, 131072, 4096, 0.9)],
)
def test_a_card_is_full_where_memory_allows(tokens, entries, D, least):
    """The rows of the second result lack memory towards the last one."""
    assert full(product(tokens, entries, D, lent_rows=entries), tokens) == 1
    second = product(entries, tokens, D, row_tile=256, other_tile=128)
    assert least <= full(second, entries) < 1


def test_sums_are_whole_where_programs_are_many():
    one = product(131072, 8192, 4096, row_tile=256, other_tile=128)
    assert [parts for *_, parts in chunks(one, 131072)][:3] == [1, 1, 1]


class Unlaunched:
    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "tokens, entries, D, logits_itemsize", [(4096, 32768, 512, 4), (16384, 65536, 256, 2)]
)
def test_the_memory_is_that_of_the_gradients(monkeypatch, tokens, entries, D, logits_itemsize):
    """What the launchers allocate, in bfloat16: a hundredth of the logits beyond the gradients."""
    launchers = pytest.importorskip("memlm.cuda.linear_cross_entropy.triton_launchers")
    for name in ("forward_kernel", "gradient_kernel", "product_kernel", "sum_kernel"):
        monkeypatch.setattr(launchers, name, Unlaunched())
    monkeypatch.setenv("MEMLM_KERNELS", "triton")
    hidden, weight = (
        torch.zeros(n, D, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, entries)
    )
    targets = torch.zeros(tokens, dtype=torch.int64)

    def step(_):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
        torch.autograd.grad(loss, [hidden, weight])

    beyond = peak_allocated(step) - hidden.nbytes - weight.nbytes
    assert 0 < beyond <= 0.01 * tokens * entries * logits_itemsize
