"""The Triton kernels of the loss without logits on a real card; skipped without a GPU."""

import pytest
import torch

from memlm.cuda import linear_cross_entropy
from memlm.cuda.linear_cross_entropy.inputs import Inputs
from memlm.cuda.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def drawn(tokens, entries, channels, dtype, peak=2.0):
    """Hidden, weight, targets of which every fifth is to be ignored, weights with zeros."""
    generator = torch.Generator("cuda").manual_seed(tokens + entries)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden, weight = draw(tokens, channels), peak * draw(entries, channels) / channels**0.5
    targets = torch.randint(0, entries, (tokens,), generator=generator, device="cuda")
    targets[2::5] = -100
    token_weights = torch.rand(tokens, generator=generator, device="cuda")
    token_weights[1::7] = 0
    return hidden.to(dtype), weight.to(dtype), targets, token_weights


def run(hidden, weight, targets, token_weights, softcap=None, z_loss=0.0):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss, losses = linear_cross_entropy(
        hidden, weight, targets, token_weights, softcap=softcap, z_loss=z_loss
    )
    dhidden, dweight = torch.autograd.grad(1.5 * loss, (hidden, weight))
    return {"loss": loss.detach(), "losses": losses, "dhidden": dhidden, "dweight": dweight}


def formula(hidden, weight, targets, token_weights, softcap=None, z_loss=0.0):
    """In float64, whatever MEMLM_KERNELS says."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss, losses = linear_cross_entropy_reference(
        Inputs.of_call(hidden, weight, targets, token_weights, -100, softcap, z_loss, False)
    )
    dhidden, dweight = torch.autograd.grad(1.5 * loss, (hidden, weight))
    return {"loss": loss.detach(), "losses": losses, "dhidden": dhidden, "dweight": dweight}


# Every size, type and softcap is compiled anew; the other tests share these.
@pytest.mark.parametrize(
    "sizes, dtype, options",
    [
        ((1, 7, 3), BF16, {}),
        ((1000, 5000, 100), FP16, {"softcap": 5.0}),
        ((2048, 8192, 512), BF16, {}),
        ((2048, 8192, 512), FP32, {}),
        ((5000, 1027, 96), BF16, {"softcap": 5.0, "z_loss": 1e-3}),
        ((300, 32000, 1024), FP32, {"z_loss": 1e-3}),
    ],
    ids=str,
)
def test_the_formula(gpu, sizes, dtype, options):
    arguments = drawn(*sizes, dtype)
    with poisoned():
        found = run(*arguments, **options)
    assert_near(found, formula(*arguments, **options), TOLERANCE[dtype])


def test_negligible_tiles_change_little(gpu):
    """Tokens that are sure of few entries: most tiles are left out, and gradients stay."""
    hidden, weight, targets, token_weights = drawn(3000, 8192, 512, BF16, peak=20.0)
    targets[:] = (hidden.double() @ weight.double().T).argmax(1)
    targets[::3] = 8191
    found = run(hidden, weight, targets, token_weights)
    expected = formula(hidden, weight, targets, token_weights)
    assert_near(found, expected, TOLERANCE[BF16])


def test_two_runs_give_the_same_bits(gpu):
    arguments = drawn(3000, 8192, 512, BF16)
    assert_deterministic(lambda: run(*arguments, z_loss=1e-4))


@pytest.mark.parametrize("tokens", [16384, 131072])
def test_the_memory_is_that_of_the_gradients(gpu, tokens):
    """What a pass holds beyond them is a hundredth of the logits at most."""
    entries = 65536
    hidden, weight, targets, token_weights = drawn(tokens, entries, 256, BF16)
    run(hidden, weight, targets, token_weights)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = run(hidden, weight, targets, token_weights)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(found[name].numel() * 2 for name in ("dhidden", "dweight"))
    assert peak - gradients <= 0.01 * tokens * entries * 2


def test_offsets_beyond_32_bits(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 30 << 30:
        pytest.skip(f"needs 30 GiB of free GPU memory, there are {free >> 30}")
    tokens, entries, channels = 1_100_800, 512, 2048
    hidden = torch.randn(tokens, channels, dtype=BF16, device="cuda")
    assert hidden.numel() > 2**31
    weight = torch.randn(entries, channels, dtype=BF16, device="cuda") / channels**0.5
    targets = torch.randint(0, entries, (tokens,), device="cuda")
    targets[:-40_960] = -100
    found = run(hidden, weight, targets, None)
    alone = run(hidden[-40_960:], weight, targets[-40_960:], None)
    assert torch.equal(found["losses"][-40_960:], alone["losses"])
    assert not found["dhidden"][:-40_960].any()
    found["dhidden"] = found["dhidden"][-40_960:]
    for name in ("dhidden", "dweight"):
        assert_near({name: found[name]}, {name: alone[name]}, TOLERANCE[BF16])
