"""The loss of a linear head: the formula against torch's, every implementation against it."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.library import peak_allocated
from memlm.cuda import linear_cross_entropy
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.linear_cross_entropy import eager
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned, scattered

FLOAT64 = torch.float64
IMPLEMENTATIONS = ["eager"]  # besides the reference
OPTIONS = [
    {},
    {"softcap": 3.0},
    {"z_loss": 0.1},
    {"softcap": 2.0, "z_loss": 0.01, "shift": True, "ignore_index": 0},
]


def make(shape=(2, 19), V=37, D=6, dtype=FLOAT64, ignored=0.2, weighted=True, seed=0):
    """Random inputs; a part of the targets is -100, a token's weight is 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, generator=generator, dtype=FLOAT64)
    weight = torch.randn(V, D, generator=generator, dtype=FLOAT64)
    targets = torch.randint(V, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = -100
    inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    if weighted:
        token_weights = torch.randn(shape, generator=generator)  # of a policy: of either sign
        token_weights.flatten()[:1] = 0
        inputs["token_weights"] = token_weights
    return inputs


def run(monkeypatch, implementation, inputs, **options):
    """Loss, losses, and the gradients of a third of the loss."""
    monkeypatch.setenv(VARIABLE, implementation)
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("hidden", "weight")}
    loss, losses = linear_cross_entropy(**(inputs | leaves), **options)
    assert loss.requires_grad and not losses.requires_grad
    dhidden, dweight = torch.autograd.grad(loss / 3, list(leaves.values()))
    assert dhidden.dtype == inputs["hidden"].dtype and dweight.dtype == inputs["weight"].dtype
    return {"loss": loss.detach(), "losses": losses, "dhidden": dhidden, "dweight": dweight}


def check(monkeypatch, implementation, inputs, tolerance=None, **options):
    """Compare with the reference in float64, on the same (rounded) values."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = run(monkeypatch, "reference", exact, **options)
    with poisoned():
        found = run(monkeypatch, implementation, inputs, **options)
    dtype = inputs["hidden"].dtype
    assert found["loss"].dtype == found["losses"].dtype
    assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)
    assert_near(found, expected, tolerance or TOLERANCE[dtype])


# --- the formula ---


def plain(inputs, reduction, ignore_index=-100):
    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
    logits, targets = (hidden @ weight.T).flatten(0, -2), inputs["targets"].flatten()
    loss = F.cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)
    return loss, hidden, weight


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_sum_and_mean_are_those_of_cross_entropy(monkeypatch, implementation, ignore_index):
    inputs = make(weighted=False)
    if ignore_index != -100:
        inputs["targets"] = inputs["targets"].clamp(min=0)
    counts = inputs["targets"] != ignore_index
    assert 0 < counts.sum() < counts.numel()
    for reduction, weights in (("sum", None), ("mean", counts.double() / counts.sum())):
        inputs["token_weights"] = weights
        found = run(monkeypatch, implementation, inputs, ignore_index=ignore_index)
        loss, *leaves = plain(inputs, reduction, ignore_index)
        losses = plain(inputs, "none", ignore_index)[0].detach()
        gradients = torch.autograd.grad(loss / 3, leaves)
        expected = {"loss": loss.detach(), "losses": losses.view_as(counts)}
        assert_near(
            found, expected | dict(zip(("dhidden", "dweight"), gradients, strict=True)), 1e-12
        )


def test_shifted_as_in_transformers(monkeypatch):
    inputs = make(weighted=False, dtype=torch.float32)
    found = run(monkeypatch, "reference", inputs, shift=True)
    logits = inputs["hidden"] @ inputs["weight"].T
    labels = inputs["targets"]
    expected = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=1)
    torch.testing.assert_close(found["loss"], expected)
    assert (found["losses"][:, -1] == 0).all() and (found["losses"][:, 0] > 0).any()


def test_softcap_and_z_loss_by_hand(monkeypatch):
    # Logits 0 and 2 log 3: the sum of the exponentials is 10.
    weight = torch.tensor([[1.0], [9.0]], dtype=FLOAT64).log()
    inputs = {"hidden": torch.ones(1, 1, dtype=FLOAT64), "weight": weight}
    inputs["targets"] = torch.tensor([1])
    ten = torch.tensor(10.0, dtype=FLOAT64).log()
    found = run(monkeypatch, "reference", inputs, z_loss=0.5)
    torch.testing.assert_close(found["losses"], (ten - weight[1]))
    torch.testing.assert_close(found["loss"], ten - weight[1, 0] + 0.5 * ten**2)
    inputs["weight"] = 4 * torch.atanh(weight / 4)
    again = run(monkeypatch, "reference", inputs, z_loss=0.5, softcap=4.0)
    torch.testing.assert_close(again["loss"], found["loss"])


# --- the implementations ---


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(monkeypatch, implementation, dtype, options):
    inputs = make(dtype=dtype)
    if options.get("ignore_index") == 0:
        inputs["targets"] = inputs["targets"].clamp(min=0)
    check(monkeypatch, implementation, inputs, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "V", "D"), [((1,), 1, 1), ((), 3, 2), ((3, 1, 41), 101, 17), ((70,), 5, 33)]
)
def test_sizes(monkeypatch, implementation, shape, V, D):
    inputs = make(shape, V, D, torch.float32, ignored=0.3)
    check(monkeypatch, implementation, inputs, softcap=5.0)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_many_chunks_and_tiles(monkeypatch, options):
    monkeypatch.setattr(eager, "NUMBERS", 1)
    monkeypatch.setattr(eager, "TILE", 50)
    check(monkeypatch, "eager", make((150,), 67, dtype=FLOAT64), **options)
    check(monkeypatch, "eager", make((150,), 67, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_and_equal_bits(monkeypatch, implementation):
    inputs = make(dtype=torch.float32)
    expected = run(monkeypatch, implementation, inputs)
    found = run(monkeypatch, implementation, {name: scattered_any(x) for name, x in inputs.items()})
    assert_near(found, expected, 1e-6)
    assert_deterministic(lambda: run(monkeypatch, implementation, inputs))


def scattered_any(x):
    return scattered(x) if x.is_floating_point() else x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("case", ["no tokens", "no targets", "no weights"])
def test_where_nothing_counts(monkeypatch, implementation, case):
    inputs = make((2, 0) if case == "no tokens" else (2, 9), dtype=torch.float32)
    if case == "no targets":
        inputs["targets"].fill_(-100)
        inputs["hidden"].fill_(torch.inf if implementation != "reference" else 1)  # of padding
    if case == "no weights":
        inputs["token_weights"].zero_()
    found = run(monkeypatch, implementation, inputs, shift=case == "no tokens")
    assert found["losses"].shape == inputs["targets"].shape
    for name in ("loss", "dhidden", "dweight"):
        assert (found[name] == 0).all(), name
    assert (found["losses"] > 0).any() == (case == "no weights")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(monkeypatch, implementation):
    inputs = make(dtype=torch.float32)
    inputs["hidden"] = 1e4 * inputs["hidden"]
    check(monkeypatch, implementation, inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(monkeypatch, implementation):
    inputs = make(dtype=torch.float32)
    rounded = inputs | {name: inputs[name].bfloat16() for name in ("hidden", "weight")}
    expected = run(
        monkeypatch,
        "reference",
        {n: x.double() if x.is_floating_point() else x for n, x in rounded.items()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = run(monkeypatch, implementation, inputs)
        # A hidden state of low precision and a weight in float32, as in training.
        mixed = run(monkeypatch, implementation, inputs | {"hidden": rounded["hidden"]})
        kept = run(monkeypatch, implementation, make(dtype=FLOAT64))
    assert_near(found, expected, TOLERANCE[torch.bfloat16])
    assert_near(mixed, expected, TOLERANCE[torch.bfloat16])
    assert kept["loss"].dtype == FLOAT64
    exact = run(monkeypatch, implementation, inputs)
    assert not torch.equal(exact["loss"], found["loss"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_gradients_that_are_needed(monkeypatch, implementation):
    inputs = make()
    expected = run(monkeypatch, implementation, inputs)
    for name in ("hidden", "weight"):
        leaf = inputs[name].detach().requires_grad_()
        loss, losses = linear_cross_entropy(**(inputs | {name: leaf}))
        (found,) = torch.autograd.grad(loss / 3, leaf)
        assert_near({"d": found}, {"d": expected[f"d{name}"]}, 1e-12)
        with torch.no_grad():
            again, same = linear_cross_entropy(**(inputs | {name: leaf}))
        assert not again.requires_grad
        assert_near({"a": again, "b": same}, {"a": expected["loss"], "b": losses}, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_against_differences_through_a_checkpoint(monkeypatch, implementation):
    """gradcheck passes backwards many times; a checkpoint computes anew for each."""
    monkeypatch.setenv(VARIABLE, implementation)
    inputs = make((5,), 7, 3)

    def function(hidden, weight):
        def loss(hidden, weight):
            given = inputs | {"hidden": hidden, "weight": weight}
            return linear_cross_entropy(**given, softcap=2.0, z_loss=0.1)[0]

        return checkpoint(loss, hidden, weight, use_reentrant=False)

    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(function, leaves)


def test_one_backward_pass(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    inputs = make()
    weight = inputs["weight"].requires_grad_()
    loss, _ = linear_cross_entropy(**inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away in a backward pass before"):
        loss.backward()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**inputs)[0], weight, create_graph=True)
    assert not gradient.requires_grad


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_wrong_arguments(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)
    inputs = make()

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match) as caught:
            linear_cross_entropy(**(inputs | changes))
        assert "\n" not in str(caught.value)

    hidden, targets = inputs["hidden"], inputs["targets"]
    refused(r"hidden is .*\(2, 18, 6\): expected floating point \(2, 19, 6\)", hidden=hidden[:, 1:])
    refused("hidden is torch.int64", hidden=hidden.long())
    refused("hidden is torch.float32 but weight is torch.float64", hidden=hidden.float())
    refused("weight is", weight=inputs["weight"][None])
    refused("weight is", weight=inputs["weight"][:0])
    refused("targets are torch.int32", targets=targets.int())
    refused("targets are .*to shift along", targets=targets[0, 0], hidden=hidden[0, 0], shift=True)
    refused("token_weights are", token_weights=inputs["token_weights"][0])
    for wrong in (-1, 37):
        refused(
            rf"a target is {wrong}: expected one of \[0, 37\)",
            targets=targets.where(targets < 9, wrong),
        )
    for wrong in (0.0, -1.0, torch.inf, torch.nan):
        refused("softcap is", softcap=wrong)
    for wrong in (-1.0, torch.inf, torch.nan):
        refused("z_loss is", z_loss=wrong)


# --- memory and compilation ---


def test_memory_beyond_the_gradients(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    N, V, D = 2048, 16384, 8
    inputs = make((N,), V, D, torch.float32, ignored=0, weighted=False)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    gradients, logits = 4 * (N + V) * D, 4 * N * V

    def step(_):
        for leaf in leaves:
            leaf.grad = None
        (linear_cross_entropy(**inputs)[0] / N).backward()

    def with_logits(_):
        F.cross_entropy(leaves[0] @ leaves[1].T, inputs["targets"])

    assert 0.03 * logits < peak_allocated(step) - gradients <= 0.05 * logits
    with torch.no_grad():
        assert peak_allocated(lambda _: linear_cross_entropy(**inputs)) < 0.02 * logits
        assert peak_allocated(with_logits) >= logits  # so it would be seen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_whole(monkeypatch, implementation):
    monkeypatch.setenv(VARIABLE, implementation)

    def function(hidden, weight, targets):
        given = linear_cross_entropy(hidden, weight, targets, softcap=4.0, z_loss=0.1, shift=True)
        return given[0] / 3, given[1]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shape in ((2, 19), (3, 11)):  # the second with sizes that are not known
        inputs = make(shape, dtype=torch.float32, weighted=False)
        results = []
        for one in (compiled, function):
            leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
            loss, losses = one(*leaves, inputs["targets"])
            assert not losses.requires_grad
            gradients = torch.autograd.grad(loss, leaves)
            results.append(dict(zip("abcd", (loss.detach(), losses, *gradients), strict=True)))
        assert_near(*results, 1e-6)
    inputs["targets"][0, 3] = 37
    with pytest.raises(ValueError, match="a target is 37"):
        compiled(*leaves, inputs["targets"])
