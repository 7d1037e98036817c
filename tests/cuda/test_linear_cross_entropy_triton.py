"""The Triton kernels of the loss without logits, in Triton's interpreter."""

import math

import pytest
import torch

from memlm.cuda import linear_cross_entropy
from memlm.cuda.dispatch import interpreting
from tests.cuda.harness import TOLERANCE, assert_near, poisoned, scattered

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

triton_launchers = pytest.importorskip("memlm.cuda.linear_cross_entropy.triton_launchers")
triton_chunks = pytest.importorskip("memlm.cuda.linear_cross_entropy.triton_chunks")

FP16, FP32 = torch.float16, torch.float32
# Tokens, entries, channels.
IN_SMALL_TILES = [
    ((1, 1, 1), {}, FP16),
    ((5, 7, 3), {"z_loss": 1e-2}, FP32),
    ((33, 64, 24), {"softcap": 3.0}, FP16),  # whole tiles of entries
]
IN_WHOLE_TILES = [  # of 128 tokens and 256 entries
    ((100, 257, 24), {"softcap": 3.0, "z_loss": 1e-2}, FP16),
    pytest.param((130, 300, 40), {}, FP32, marks=pytest.mark.slow),
    pytest.param((257, 256, 64), {"softcap": 3.0}, FP16, marks=pytest.mark.slow),
    pytest.param((2, 1030, 70), {}, FP16, marks=pytest.mark.slow),
]


def problem(tokens, entries, channels, dtype=FP32):
    """Hidden, weight, targets of which every third is to be ignored, weights with zeros."""
    generator = torch.Generator().manual_seed(tokens + entries)
    hidden = torch.randn(tokens, channels, generator=generator).to(dtype)
    weight = (2 * torch.randn(entries, channels, generator=generator) / channels**0.5).to(dtype)
    targets = torch.randint(0, entries, (tokens,), generator=generator)
    targets[2::3] = -100
    token_weights = torch.rand(tokens, generator=generator)
    token_weights[1::5] = 0
    return hidden, weight, targets, token_weights


def run(monkeypatch, kernels, hidden, weight, *arguments, **options):
    """Losses and gradients, of inputs of their own."""
    monkeypatch.setenv("MEMLM_KERNELS", kernels)
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss, losses = linear_cross_entropy(hidden, weight, *arguments, **options)
    dhidden, dweight = torch.autograd.grad(1.5 * loss, (hidden, weight))
    return {"loss": loss.detach(), "losses": losses, "dhidden": dhidden, "dweight": dweight}


def compare(monkeypatch, hidden, weight, *arguments, **options):
    with poisoned():
        found = run(monkeypatch, "triton", hidden, weight, *arguments, **options)
    doubles = hidden.double(), weight.double()
    expected = run(monkeypatch, "reference", *doubles, *arguments, **options)
    assert found["dhidden"].dtype == hidden.dtype and found["dweight"].dtype == weight.dtype
    assert_near(found, expected, TOLERANCE[hidden.dtype])
    return found


@pytest.fixture
def lists(monkeypatch):
    """The tiles that each product adds up, as it is made, flags [row tiles, tiles], and in how many
    parts."""
    seen = {False: [], True: [], "parts": []}
    multiply = triton_launchers._Problem._multiply

    def spy(self, gradients, tile_lists, tile_counts, factors, output, transposed, parts, sums):
        listed = torch.arange(tile_lists.shape[1]) < tile_counts[:, None]
        flags = torch.zeros_like(tile_lists).scatter(1, tile_lists.long(), listed.int())
        seen[transposed].append(flags)
        seen["parts"].append(parts)
        lists = tile_lists, tile_counts
        multiply(self, gradients, *lists, factors, output, transposed, parts, sums)

    monkeypatch.setattr(triton_launchers._Problem, "_multiply", spy)
    return seen


@pytest.fixture
def small(monkeypatch):
    """Tiles of 32 tokens and 32 entries, products in steps of 32, splits of two tiles."""
    tiles = triton_launchers._Tiles(32, 32, 32, 4, 2)
    monkeypatch.setattr(triton_launchers._Tiles, "of", lambda *_: tiles)
    monkeypatch.setattr(triton_launchers, "SPLIT", 64)


@pytest.mark.parametrize("sizes, options, dtype", IN_SMALL_TILES, ids=str)
def test_the_formula(monkeypatch, small, sizes, options, dtype):
    compare(monkeypatch, *problem(*sizes, dtype), **options)


@pytest.mark.parametrize("sizes, options, dtype", IN_WHOLE_TILES, ids=str)
def test_the_formula_in_whole_tiles(monkeypatch, sizes, options, dtype):
    compare(monkeypatch, *problem(*sizes, dtype), **options)


def test_one_gradient_alone(monkeypatch, small):
    hidden, weight, targets, _ = problem(9, 40, 8)
    both = run(monkeypatch, "triton", hidden, weight, targets)
    for name, tensor in (("dhidden", hidden), ("dweight", weight)):
        tensor = tensor.requires_grad_()
        loss, _ = linear_cross_entropy(hidden, weight, targets)
        (found,) = torch.autograd.grad(1.5 * loss, (tensor,))
        torch.testing.assert_close(found, both[name])
        tensor.requires_grad_(False)


@pytest.mark.parametrize(
    "sizes, of_hidden, of_weight, parts",
    [
        ((47, 160, 16), [1, 1], [1] * 5, [2, 2, 2, 1, 1, 1, 1]),
        pytest.param((160, 47, 16), [1] * 5, [1, 1], [2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.slow),
        pytest.param((130, 100, 96), [1] * 5, [2, 2], [1] * 7, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_chunks_and_parts(monkeypatch, lists, small, sizes, of_hidden, of_weight, parts):
    monkeypatch.setattr(triton_chunks, "PART", 1)
    compare(monkeypatch, *problem(*sizes, FP16))
    assert [len(flags) for flags in lists[False]] == of_hidden
    assert [len(flags) for flags in lists[True]] == of_weight
    assert lists["parts"] == parts


def peaked(dtype):
    """Tokens that are sure of one of the first 20 entries; two have a target far from them."""
    hidden = torch.eye(20, 24)[torch.arange(70) % 20].to(dtype)
    weight = torch.zeros(90, 24)
    weight[:20, :20] = 30 * torch.eye(20)
    targets = (torch.arange(70) + 1) % 20
    targets[3], targets[40] = 70, 40
    targets[5:8] = targets[64:] = -100
    return hidden, weight.to(dtype), targets


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_negligible_tiles_are_left_out(monkeypatch, lists, small, dtype):
    """Of float32 only those of tokens that do not count."""
    compare(monkeypatch, *peaked(dtype))
    found = torch.cat(lists[False])
    if dtype == FP16:
        assert found.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    else:
        assert found.tolist() == [[1] * 3, [1] * 3, [0] * 3]
    assert torch.equal(torch.cat(lists[True]), found.T)


def test_what_is_not_negligible_stays(monkeypatch, lists, small):
    """One entry just above the bound keeps its tile, one just below does not."""
    hidden, weight, targets = peaked(FP16)
    targets[:] = 0
    bound = 30 + math.log(triton_launchers.LEAST[FP16])
    weight[40, 5], weight[80, 6] = bound + 0.05, bound - 0.05
    compare(monkeypatch, hidden[:30], weight, targets[:30])
    assert torch.cat(lists[False]).tolist() == [[1, 1, 0]]


def test_small_weights_keep_their_precision(monkeypatch, small):
    """float16 has no numbers of this size."""
    hidden, weight, targets, token_weights = problem(20, 30, 16, FP16)
    scale = 2.0**-30
    monkeypatch.setenv("MEMLM_KERNELS", "triton")
    inputs = [x.float().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", FP16):
        loss, _ = linear_cross_entropy(*inputs, targets, scale * token_weights)
    found = dict(zip(("dhidden", "dweight"), torch.autograd.grad(loss, inputs), strict=True))
    doubles = hidden.double(), weight.double()
    expected = run(monkeypatch, "reference", *doubles, targets, scale * token_weights)
    for name, gradient in found.items():
        assert gradient.dtype == FP32
        assert_near({name: 1.5 * gradient}, {name: expected[name]}, TOLERANCE[FP16])


def test_no_token_counts(monkeypatch, small):
    hidden, weight, targets, token_weights = problem(40, 20, 8)
    for arguments in (
        (targets.fill_(-100), token_weights),
        (targets.clone().fill_(3), torch.zeros_like(token_weights)),
    ):
        found = compare(monkeypatch, hidden, weight, *arguments)
        assert found["loss"] == 0 and not found["dhidden"].any() and not found["dweight"].any()
    found = compare(
        monkeypatch, *(x[:0] if x is not weight else x for x in (hidden, weight, *arguments))
    )
    assert found["losses"].shape == (0,) and not found["dweight"].any()


def test_ignored_index_that_is_an_entry(monkeypatch, small):
    hidden, weight, targets, _ = problem(9, 12, 8)
    compare(monkeypatch, hidden, weight, targets.clamp(min=0), ignore_index=0)


def test_layout_and_run_change_no_bit(monkeypatch, small):
    hidden, weight, *others = problem(9, 20, 8, FP16)
    first = run(monkeypatch, "triton", hidden, weight, *others, z_loss=0.1)
    moved = scattered(hidden), scattered(weight)
    other = run(monkeypatch, "triton", *moved, *others, z_loss=0.1)
    assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_what_is_not_a_number_shows(monkeypatch, small):
    """Filtering does not hide a token whose logits are not numbers."""
    hidden, weight, targets = peaked(FP16)
    hidden[4] = torch.nan
    found = run(monkeypatch, "triton", hidden[:30], weight, targets[:30])
    assert found["loss"].isnan() and found["losses"][4].isnan()
    assert found["losses"].isnan().sum() == 1
    assert found["dhidden"][4].isnan().all() and found["dweight"].isnan().all()


def test_float64_is_refused(monkeypatch):
    hidden, weight, targets, _ = problem(3, 4, 5, torch.float64)
    monkeypatch.setenv("MEMLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="linear_cross_entropy: the inputs are float64"):
        linear_cross_entropy(hidden, weight, targets)
