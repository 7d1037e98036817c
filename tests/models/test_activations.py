"""What blocks keep for the backward pass changes no loss, state, random number or gradient."""

import copy
import gc
import importlib
import weakref
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from memlm.errors import UserError
from memlm.layers.saved_tensors import SavedOnHost
from memlm.models.activations import compile_blocks, set_activations
from tests.memory.contract import SPECS, cases
from tests.memory.law_tools import LENGTH, VOCABULARY, build_model, run, snapshot
from tests.models.attach_tools import FAMILIES, attached

POLICIES = ("recompute", "selective", "offload", "recompute_offload")
CPU = torch.device("cpu")


def results(model, policy, **kwargs):
    """Logits, states, gradients and the next random number of two calls, the second packed."""
    model = copy.deepcopy(model).train()
    host = set_activations(model, policy, smallest=1)
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    segments, positions = torch.ones_like(ids), torch.arange(LENGTH).repeat(2, 1)
    segments[0, 13:] = 2
    positions[0, 13:] -= 13
    packed = {"segment_ids": segments, "position_ids": positions}
    first, states = run(model, ids[:, :9], **kwargs)
    second, states = run(model, ids, states, **packed, **kwargs)
    before = snapshot(states)
    (first.square().mean() + second.square().mean()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": {"": second.detach(), "random": torch.rand(1)}, **before, "": gradients}, host


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), f"{name}.{key} differs"


def every_memory():
    """Each memory with two policies, turn by turn; with all in the slow tests."""
    found, turn = [], 0
    firsts = {(c.memory, c.site, c.spec.label): c for c in cases() if c.memory in SPECS}
    for (memory, site, label), case in firsts.items():
        spec = SPECS[memory][0]
        quick = (site, label) == (spec.sites[0], spec.label)
        chosen = {POLICIES[turn % 4], POLICIES[(turn + 1) % 4]} if quick else set()
        turn += 2 * quick + (turn % 4 == 2) * quick
        for policy in POLICIES:
            marks = [] if policy in chosen else [pytest.mark.slow]
            found.append(pytest.param(case, policy, marks=marks, id=f"{case}-{policy}"))
    return found


@pytest.mark.parametrize(("case", "policy"), every_memory())
def test_every_memory(case, policy):
    model = case.build(torch.float32, repeat=case.repeat, **case.spec.stable)
    expected, _ = results(model, "keep")
    found, host = results(model, policy)
    assert_same(found, expected)
    assert ("offload" in policy) == (host is not None and host.sent_bytes > 0)


def attached_cases():
    found = []
    for family in FAMILIES:
        for memory in ("gated_delta", "knn_cache", "titans"):
            for policy in POLICIES:
                quick = (family, memory) == ("llama", "knn_cache") and policy != "recompute"
                marks = [] if quick else [pytest.mark.slow]
                found.append(pytest.param(family, memory, policy, marks=marks))
    return found


@pytest.mark.parametrize(("family", "memory", "policy"), attached_cases())
def test_attached_memories(family, memory, policy):
    model = attached(family, memory, share="store" if memory == "knn_cache" else None)
    expected, _ = results(model, "keep")
    found, host = results(model, policy)
    assert_same(found, expected)
    assert ("offload" in policy) == (host is not None and host.sent_bytes > 0)


OPERATORS = {"gated_delta": "linear_recurrence", "min_gru": "diagonal_scan"}


@pytest.mark.parametrize("memory", OPERATORS)
def test_selective_runs_no_operator_twice(memory):
    case = next(case for case in cases() if case.memory == memory)
    model = case.build(torch.float32).train()
    operator = importlib.import_module(f"memlm.cuda.{OPERATORS[memory]}.operator")
    ids, times = torch.randint(VOCABULARY, (1, LENGTH)), {}
    for policy in ("keep", "recompute", "selective"):
        set_activations(model, policy)
        with mock.patch.object(operator, "_module", wraps=operator._module) as implementation:
            model(ids, labels=ids).loss.backward()
        times[policy] = implementation.call_count
    assert times["selective"] == times["keep"] < times["recompute"]


def test_selective_calls_under_one_autocast():
    layers = [{"mixer": {"type": "sliding_attention", "window": 6, "num_heads": 2}}]
    model = build_model(layers, torch.float32).train()
    ids, gradients = torch.randint(VOCABULARY, (1, LENGTH)), []
    for policy in ("keep", "selective"):
        set_activations(model, policy)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # which casts a weight once
            loss = model(ids, labels=ids).loss + model(ids.flip(1), labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        error = (gradients[1][name] - gradient).norm()
        assert error <= 0.01 * gradient.norm(), name


def test_what_is_unknown_is_refused():
    model = build_model([{"mixer": "min_gru"}])
    with pytest.raises(UserError, match="offload"):
        set_activations(model, "offlaod")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="cannot run again"):
        set_activations(model, "recompute")
    assert set_activations(model, "keep") is None


MEMORIES = {
    "gated_delta": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
    "retention": {"type": "retention", "num_heads": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keep", "offload"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_compiled_blocks(memory, policy):
    attention = {"type": "sliding_attention", "window": 6, "num_heads": 2}
    layers = [{"mixer": attention, "memory": MEMORIES[memory], "ffn": "swiglu"}]
    model = build_model(layers, torch.float32).train()
    set_activations(model, policy, smallest=1)
    ids, found = torch.randint(VOCABULARY, (2, LENGTH)), []
    names = list(model.state_dict())
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        if compiled:
            compile_blocks(model, "aot_eager")
        model.zero_grad()
        output = model(ids, labels=ids, return_memory_states=True)
        carried = {name: state.detach() for name, state in output.memory_states.items()}
        (output.loss + model(ids, labels=ids, memory_states=carried).loss).backward()
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert list(model.state_dict()) == names
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_blocks_that_cannot_be_compiled_are_refused():
    model = build_model([{"mixer": "min_gru"}])
    set_activations(model, "recompute")
    with pytest.raises(UserError, match="run again are not compiled"):
        compile_blocks(model)
    with pytest.raises(UserError, match="by hooks"):
        compile_blocks(attached("llama", "gated_delta"))


# --- what is saved on the host ---


def in_blocks(functions, x, host, stay=()):
    for function in functions:
        with host.block(x.device, stay):
            x = function(x)
    return x


class Odd(torch.autograd.Function):
    """Saves views of all kinds: strided, expanded, transposed, empty, of whole numbers."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x[:, ::2], x[:1].expand(5, -1), x.mT, x[:0], torch.arange(4), x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        strided, expanded, turned, empty, numbers, x = ctx.saved_tensors
        assert torch.equal(strided, x[:, ::2]) and strided.stride() == x[:, ::2].stride()
        assert torch.equal(expanded, x[:1].expand(5, -1)) and expanded.stride(0) == 0
        assert torch.equal(turned, x.mT) and not turned.is_contiguous()
        assert empty.shape == x[:0].shape and torch.equal(numbers, torch.arange(4))
        assert turned.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return gradient * 2


def test_views_come_back_as_they_were_and_a_storage_is_sent_once():
    host = SavedOnHost(smallest=64)
    x = torch.randn(8, 8, requires_grad=True)
    y = in_blocks([lambda x: x.sin(), Odd.apply, lambda x: x * 2], x, host)
    # x by sin, what Odd was given in all its views; the product with a number saves nothing.
    assert host.sent_bytes == host.held_bytes == 2 * x.nbytes
    y.sum().backward()
    del y
    gc.collect()
    assert host.held_bytes == 0
    torch.testing.assert_close(x.grad, 4 * x.cos().detach())


def test_parameters_and_small_tensors_stay():
    host = SavedOnHost(smallest=1024)
    layer = torch.nn.Linear(64, 64)
    x = torch.randn(32, 64, requires_grad=True)
    in_blocks([layer, lambda x: x[:, :1].clone().exp()], x, host, list(layer.parameters()))
    assert host.sent_bytes == x.nbytes


def test_blocks_leave_the_device_and_come_back_one_ahead():
    host, moves = SavedOnHost(smallest=1), []
    kind = type(host._copies_of(CPU))

    class Next(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x + 1

        @staticmethod
        def backward(ctx, gradient):
            moves.append(("used", int(ctx.saved_tensors[0][0])))
            return gradient

    def note(name):
        function = getattr(kind, name)

        def noted(self, *args):
            moves.append((name, int(args[0].view(torch.float32)[0])))
            return function(self, *args)

        return mock.patch.object(kind, name, noted)

    with note("send"), note("bring"):
        x = torch.zeros(4, requires_grad=True)
        y = in_blocks([Next.apply] * 5, x, host)
        assert moves == [("send", value) for value in range(5)]
        moves.clear()
        y.sum().backward()
    # The last two blocks were still there; a block asks for the one that comes next.
    assert moves == [
        *[("used", 4), ("bring", 2), ("used", 3)],
        *[("bring", 1), ("used", 2), ("bring", 0), ("used", 1), ("used", 0)],
    ]


def test_a_change_in_place_is_an_error_while_a_tensor_is_on_the_device():
    for stay in (False, True):
        host = SavedOnHost(smallest=1)
        x = torch.randn(4, requires_grad=True)
        y = x * 1
        z = in_blocks([torch.sin], y, host, [y] if stay else [])
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_a_tensor_saved_again_after_a_change_is_sent_again():
    host = SavedOnHost(smallest=1)
    x = torch.randn(4, requires_grad=True)
    y = x * 1
    first = in_blocks([torch.sin, torch.clone, torch.clone, torch.clone], y, host)
    in_blocks([torch.sin, torch.sin, torch.sin], torch.randn(4, requires_grad=True), host)
    expected = y.detach().cos()
    with torch.no_grad():
        y.add_(1)  # the first has left the device
    second = in_blocks([torch.sin], y, host)
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(x.grad, expected + (x.detach() + 1).cos())


def test_a_graph_is_gone_through_twice():
    host = SavedOnHost(smallest=1)
    x = torch.randn(4, requires_grad=True)
    y = in_blocks([torch.sin] * 4, x, host).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("smallest", [1, 1 << 20])
def test_a_graph_without_a_backward_pass_is_freed(smallest):
    host = SavedOnHost(smallest)
    x = torch.randn(4, requires_grad=True)
    y = in_blocks([torch.exp] * 2, x, host)  # which saves its output
    alive = weakref.ref(y)
    del y
    assert alive() is None and host.held_bytes == 0


def test_inputs_of_a_checkpoint_are_sent_and_nothing_else():
    host = SavedOnHost(smallest=1)
    x = torch.randn(4, requires_grad=True)

    def block(x):
        return checkpoint(lambda x: x.sin().exp().cos(), x, use_reentrant=False)

    y = in_blocks([block] * 3, x, host)
    assert host.sent_bytes == 3 * x.nbytes
    y.sum().backward()
    twin = x.detach().requires_grad_()
    z = twin
    for _ in range(3):
        z = z.sin().exp().cos()
    z.sum().backward()
    assert torch.equal(x.grad, twin.grad)
