"""The C++ search: every instruction set, the filter of bytes, threads, and what memory it takes."""

import functools
import os
import platform
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.library import resident_growth
from memlm.cuda import native as loader
from memlm.cuda import quantize_keys, topk_search
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.topk_search import native, reference
from tests.memory.processes import run_processes

pytestmark = pytest.mark.native(native.SOURCE)
OF_THIS_CPU = loader.NATIVE


def instruction_sets():
    """Compiler options that this CPU can run the result of."""
    found = [OF_THIS_CPU]
    if platform.machine() == "x86_64":
        found += ["-march=x86-64"]
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            found += ["-march=x86-64-v3"]
    return found


def has_filter():
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_vnni" in flags.read_text()


@pytest.fixture(params=instruction_sets())
def instructions(request, monkeypatch):
    monkeypatch.setattr(loader, "NATIVE", request.param)
    loader._library.cache_clear()
    native._library.cache_clear()
    yield request.param
    loader._library.cache_clear()
    native._library.cache_clear()


def whole(*shape, size=3, generator):
    """Small whole numbers: scores are exact and often equal."""
    return torch.randint(-size, size + 1, shape, generator=generator).float()


def draw(generator, *options):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def search(queries, keys, k, metric="dot", valid=None, positions=None, scales=None):
    return native.topk_search(queries, keys, k, metric, valid, positions, scales)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_whole_numbers_are_found_as_by_the_reference(instructions):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        pick = functools.partial(draw, generator)
        batch, tokens = pick(1, 2, 3), pick(1, 7, 8, 17, 33, 70, 530)
        stored, width = pick(1, 63, 64, 65, 130, 700), pick(1, 3, 16, 20, 48)
        k, metric = pick(1, 5, 40, 200), pick("dot", "l2")
        queries = whole(batch, tokens, width, generator=generator)
        keys = whole(batch, stored, width, generator=generator)
        scales = None
        kind = pick("float32", "float16", "bfloat16", "int8")
        keys = keys.to(getattr(torch, kind))
        if kind == "int8":
            scales = 2.0 ** torch.randint(-3, 4, (batch, stored), generator=generator)
        valid = pick(None, torch.rand(batch, stored, generator=generator) < 0.6)
        positions = None
        if pick(True, False):
            far = pick(0, -(2**62), 2**40)
            spread = pick(1, 2**33)
            key_positions = torch.arange(stored).expand(batch, -1)
            if pick(True, False):
                key_positions = torch.randint(0, stored, (batch, stored), generator=generator)
            last = torch.randint(0, stored + 9, (batch, tokens), generator=generator)
            first = last - torch.randint(0, stored, (batch, tokens), generator=generator)
            positions = tuple(far + spread * x for x in (key_positions, first, last))
        given = (queries, keys, k, metric, valid, positions, scales)
        assert same(search(*given), reference.topk_search(*given)), seed


def difficult(generator, kind, tokens, stored, width):
    """Queries and keys whose bytes are bad estimates of them, each in its own way."""
    queries = torch.randn(1, tokens, width, generator=generator)
    keys = torch.randn(1, stored, width, generator=generator)
    if kind == "sizes":
        keys *= torch.exp(3 * torch.randn(1, stored, 1, generator=generator))
        queries *= torch.exp(3 * torch.randn(1, tokens, 1, generator=generator))
    elif kind == "outlier channel":
        keys[..., 0] *= 100
    elif kind == "near ties":
        copies = torch.randint(max(stored // 20, 1), (stored,), generator=generator)
        keys = keys[:, copies] + 1e-4 * keys
    elif kind == "common direction":
        keys, queries = keys + 20, queries + 20
    elif kind == "extreme sizes":
        keys, queries = keys * 1e-9, queries * 1e8
        keys[0, 0], keys[0, 1], queries[0, 3] = 0, 1e13, 0
    elif kind == "not finite":
        keys[0, 5, 0], keys[0, -1, -1], queries[0, 2, 0] = torch.nan, torch.inf, torch.nan
    elif kind == "sorted":
        keys = keys[:, (keys @ queries[0, 0]).argsort(1)[0]]
    return queries, keys


KINDS = ("plain", "sizes", "outlier channel", "near ties", "common direction", "extreme sizes")


@pytest.mark.parametrize("kind", [*KINDS, "not finite", "sorted"])
def test_the_best_of_difficult_keys(instructions, kind):
    generator = torch.Generator().manual_seed(KINDS.index(kind) if kind in KINDS else 9)
    for metric in ("dot", "cosine", "l2"):
        for stored, width, k in ((3000, 64, 16), (700, 33, 100)):
            queries, keys = difficult(generator, kind, 40, stored, width)
            found = search(queries, keys, k, metric)
            if instructions == OF_THIS_CPU and has_filter():
                # One query is scored with every key: the filter may not change a bit.
                alone = [search(query[:, None], keys, k, metric) for query in queries.unbind(1)]
                assert same(found, [torch.cat(parts, 1) for parts in zip(*alone, strict=True)])
            expected = reference.topk_search(queries, keys, k, metric, None, None, None)
            size = queries.norm(dim=-1).nan_to_num(1) * keys.norm(dim=-1).nan_to_num(0, 0).amax()
            allowed = 1e-6 * (size if metric != "cosine" else torch.ones(()))
            if metric == "l2":
                allowed = 2 * allowed + 1e-6 * keys.square().sum(-1).nan_to_num(0, 0).amax()
            off = (found[0] - expected[0]).nan_to_num(0).abs().amax(-1)
            assert (off <= allowed).all()
            assert torch.equal(found[1] < 0, expected[1] < 0)
            assert all(len(set(row.tolist())) == k for row in found[1][0] if (row >= 0).all())


@pytest.mark.parametrize("rounded", ["key", "queries"])
def test_bytes_that_are_all_rounded_one_way(instructions, rounded):
    # The last key is the best, but its bytes or those of the queries put it behind all others: as
    # far as rounding can, since what is lost points into one direction.
    queries, keys = torch.ones(1, 40, 64), torch.zeros(1, 2000, 64)
    if rounded == "key":
        queries[..., 0], keys[..., 0] = 0, 127
        keys[..., 1:] = 50
        keys[0, :-1, 1:30] = 51  # 29 more than 63 * 50, the last key 30.87
        keys[0, -1, 1:] = 50.49
    else:
        queries[..., 0], queries[..., 1:] = 127, 50.49
        keys[0, :-1, 0] = 25  # 127 * 25 = 63 * 50 + 25
        keys[0, -1, 1:] = 1
    assert search(queries, keys, 1)[1].eq(1999).all()


def test_the_filter_keeps_what_is_visible_apart(instructions):
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 64, 32, generator=generator), torch.randn(2, 5000, 32)
    keys[:, 2500:] *= 50  # what the first queries may not see scores highest
    last = torch.linspace(0, 5000, 64).long().expand(2, -1)
    positions = (torch.arange(5000).expand(2, -1), torch.zeros_like(last), last)
    scores, indices = search(queries, keys, 10, positions=positions)
    expected = reference.topk_search(queries, keys, 10, "dot", None, positions, None)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0], atol=1e-3, rtol=1e-5)


def test_threads_change_nothing(instructions, monkeypatch):
    monkeypatch.setattr(native, "PARALLEL", 0)
    generator = torch.Generator().manual_seed(2)
    before = torch.get_num_threads()
    try:
        for batch, tokens, stored in ((1, 5, 1000), (1, 600, 700), (3, 40, 300), (5, 1, 130)):
            queries = torch.randn(batch, tokens, 24, generator=generator)
            keys = whole(batch, stored, 24, size=1, generator=generator)
            valid = torch.rand(batch, stored, generator=generator) < 0.8
            found = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                found.append(search(queries, keys, 12, "l2", valid))
            assert all(same(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


def test_tensors_that_lie_apart():
    generator = torch.Generator().manual_seed(3)
    keys = whole(3, 400, 40, generator=generator)
    queries = whole(3, 20, 40, generator=generator)
    valid = torch.rand(1, 400, generator=generator).expand(3, -1) < 0.5
    places = torch.arange(400).expand(3, -1)
    last = torch.full((1, 1), 300).expand(3, 20)
    positions = (places, last - 250, last)
    for cut in (lambda x: x[:, 37:301], lambda x: x[:, ::2], lambda x: x[1::2]):
        rows = cut(keys).shape[0]
        given = (queries[:rows], cut(keys), 9, "l2", cut(valid))
        seen = (cut(places), *(x[:rows] for x in positions[1:]))
        assert same(search(*given, seen), reference.topk_search(*given, seen, None))
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride(-1) != 1
    assert same(search(queries, turned, 9), search(queries, keys, 9))


def test_scores_do_not_depend_on_how_keys_are_cut():
    generator = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(1, 33, 50, generator=generator), torch.randn(1, 1111, 50)
    scores, indices = search(queries, keys, 8)
    for cut in (1, 500, 1100):
        parts = [search(queries, part, 8) for part in (keys[:, :cut], keys[:, cut:])]
        together = torch.cat([part[0] for part in parts], -1).sort(-1, descending=True)[0]
        assert torch.equal(together[..., :8], scores)
    assert (indices >= 0).all()


def test_what_it_is_not_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "native")
    queries = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="float64, it computes in float32"):
        topk_search(queries, queries.double(), 1)
    with pytest.raises(RuntimeError, match="on meta, it runs on the CPU"):
        topk_search(queries.to("meta"), queries.to("meta"), 1)
    monkeypatch.setattr(native, "MOST_KEYS", 1)
    with pytest.raises(RuntimeError, match="with 32 bits, a store has 2"):
        topk_search(queries, queries, 1)


def measure(stored, width, kind):
    """Megabytes that searches for 512 queries take at their peak, by implementation."""
    keys, scales = torch.randn(1, stored, width), None
    if kind == "int8":
        keys, scales = quantize_keys(keys)
    else:
        keys = keys.to(getattr(torch, kind))
    queries = torch.randn(1, 512, width)
    found = {}
    for implementation in ("native", "eager"):
        os.environ[VARIABLE] = implementation
        few = None if scales is None else scales[:, :100]
        topk_search(queries[:, :32], keys[:, :100], 32, scales=few)
        growth = resident_growth(lambda _: topk_search(queries, keys, 32, scales=scales))
        found[implementation] = growth / 1e6
    return found


def megabytes(stored, width, kind):
    """`measure` in a process of its own."""
    return run_processes(1, measure, stored, width, kind)[0]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
def test_memory_is_bounded():
    found = megabytes(40_000, 64, "float16")
    assert found["native"] < 8 and found["eager"] < 32, found


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("width", [64, 256])
def test_memory_of_a_large_store(kind, width):
    found = megabytes(262_144, width, kind)
    assert max(found.values()) < 64, found


def test_bytes_of_keys():
    keys = torch.tensor([[[1.27, -0.01, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    found, scales = quantize_keys(keys)
    assert found.dtype == torch.int8 and found.tolist() == [[[127, -1, 0], [0, 0, 0]]]
    torch.testing.assert_close(scales, torch.tensor([[0.01, 0.0]]))
    assert not scales.requires_grad and quantize_keys(keys[..., :0])[1].shape == (1, 2)
