"""The recurrence in C++ against the reference in float64: values, all gradients, and their bits."""

import itertools

import pytest
import torch

from memlm.cuda import linear_recurrence
from memlm.cuda import native as loader
from memlm.cuda.linear_recurrence import (
    CHUNK,
    first_chunk_slots,
    linear_recurrence_step,
    native,
    operator,
)
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned, scattered
from tests.cuda.recurrence_cases import DECAYS, LENGTHS, Case, call, results, weighted

pytestmark = pytest.mark.native(native.SOURCE)

NEAR = 2e-6  # relative root mean square error in float32
SIZES = ((1, 1, 4, 4), (1, 2, 5, 3), (2, 2, 16, 9), (2, 6, 3, 8), (1, 1, 64, 64), (1, 2, 33, 70))
OPTIONS = ("qk_l2norm", "beta_sigmoid", "allow_neg_eigval")


def options(number: int, delta: bool) -> tuple[str, ...]:
    chosen = [name for bit, name in enumerate(OPTIONS) if number >> bit & 1]
    return tuple(name for name in chosen if delta or name == "qk_l2norm")


def expected(tensors, **settings):
    exact = {name: x.double() for name, x in tensors.items()}
    return results("reference", exact, **settings)


def assert_equals_the_reference(tensors, **settings):
    found, wanted = results("native", tensors, **settings), expected(tensors, **settings)
    # Gradients of what all tokens share are sums of terms that may cancel.
    sums = {f"d{name}" for name, x in tensors.items() if x.ndim == 1}
    for names, tolerance in ((sums, 20 * NEAR), (found.keys() - sums, NEAR)):
        assert_near(*({name: x[name] for name in names} for x in (found, wanted)), tolerance)


def sweep() -> list[Case]:
    """Lengths, decays and rules in all combinations; sizes, options and initial states in turn."""
    lengths = [((T, T), False) for T in (0, 1, 2, 31, 64, 65, 150)]
    lengths += [(packed, True) for packed in LENGTHS]
    cases = []
    for n, ((length, packed), decay, delta) in enumerate(
        itertools.product(lengths, DECAYS, (True, False))
    ):
        settings = {"options": options(n // 3, delta), "initial_state": n % 5 > 0}
        cases.append(Case(length, SIZES[n % 6], packed, delta, decay, **settings))
    return cases


@pytest.mark.parametrize("case", sweep(), ids=str)
def test_equals_the_reference(case):
    tensors = case.make(torch.float32)
    assert_equals_the_reference(tensors, **case.settings())


@pytest.mark.parametrize("sizes", [(1, 1, 256, 16), (1, 1, 16, 256), (1, 1, 1, 1), (1, 2, 96, 40)])
@pytest.mark.parametrize("delta", [True, False])
def test_every_width(sizes, delta):
    case = Case((70,), sizes, delta=delta, decay="gated")
    tensors = case.make(torch.float32)
    assert_equals_the_reference(tensors)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_strong_gates(delta, packed):
    lengths = (150, 33, 1) if packed else (150, 150)
    case = Case(lengths, packed=packed, delta=delta, decay="gated", strength=16.0)
    tensors = case.make(torch.float32)
    assert_equals_the_reference(tensors, **case.settings())


def test_gates_of_all_sizes_in_one_chunk():
    # After a few tokens that forget nearly everything, others forget next to nothing: sums of log
    # decays are large and their differences small.
    tensors = Case((150,), (1, 2, 16, 8)).make(torch.float32)
    tensors["log_decay"] *= 0.01
    tensors["log_decay"][:, ::6] = -40.0
    assert_equals_the_reference(tensors)


@pytest.mark.parametrize("T", [1, 70])
def test_write_strengths_zero_and_two_on_equal_keys(T):
    tensors = Case((T, T), (1, 2, 6, 4), strength=0.2).make(torch.float32)
    tensors["k"] = tensors["k"][:, :1].repeat(1, T, 1, 1)
    tensors["beta"] = torch.full_like(tensors["beta"], 2.0)
    tensors["beta"][:, ::3] = 0.0
    # Keys of length 1 up to rounding: every write may reflect the state, so errors do not fade.
    assert_near(results("native", tensors), expected(tensors), TOLERANCE[torch.float32])


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("T, where", [(1, 0), (70, 0), (70, 40), (70, 69)])
def test_a_decay_of_minus_infinity(delta, T, where):
    tensors = Case((T, T), delta=delta).make(torch.float32)
    tensors["log_decay"][:, where] = -torch.inf
    assert_equals_the_reference(tensors)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "beta", "initial_state"])
@pytest.mark.parametrize("T", [1, 40])
def test_a_nan_is_not_lost(T, name):
    tensors = Case((T,)).make(torch.float32)
    tensors[name].view(-1)[0] = torch.nan
    o, state = call("native", tensors, return_state=True)
    assert o[0, -1].isnan().any() if name == "q" and T == 1 else o.isnan().any()
    assert name == "q" or state.isnan().any()


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("cut", [1, 32, 64, 96])
def test_the_gradient_flows_through_a_passed_state(delta, cut):
    tensors = Case((97, 97), (2, 4, 5, 3), delta=delta).make(torch.float32)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    state, outputs = leaves["initial_state"], []
    for part in (slice(0, cut), slice(cut, None)):
        pieces = {name: x[:, part] for name, x in leaves.items() if name != "initial_state"}
        o, state = call("native", pieces | {"initial_state": state}, return_state=True)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad(weighted(o, state), list(leaves.values()))
    found = {"o": o, "state": state}
    found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    assert_near({name: x.detach() for name, x in found.items()}, expected(tensors), NEAR)


@pytest.mark.parametrize(
    "case", [Case((40, 40)), Case((1, 1)), Case((9, 0, 70), packed=True)], ids=str
)
def test_inputs_that_are_not_contiguous(case):
    tensors = case.make(torch.float32)
    whole = results("native", tensors, **case.settings())
    leaves = {name: scattered(x).requires_grad_() for name, x in tensors.items()}
    o, state = call("native", leaves, return_state=True, **case.settings())
    gradients = torch.autograd.grad(weighted(o, state), list(leaves.values()))
    found = {"o": o.detach(), "state": state.detach()}
    found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    for name, x in whole.items():
        assert torch.equal(found[name], x), name


def test_heads_that_lie_before_tokens():
    tensors = Case((70, 70), (2, 4, 16, 8)).make(torch.float32)
    turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tensors.items()}
    for name, x in results("native", tensors).items():
        assert torch.equal(results("native", turned)[name], x), name


def test_an_expanded_output_gradient():
    tensors = Case((40, 40)).make(torch.float32)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    found = torch.autograd.grad(call("native", leaves)[0].sum(), list(leaves.values()))
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    wanted = torch.autograd.grad(call("reference", exact)[0].sum(), list(exact.values()))
    pairs = (dict(zip(leaves, x, strict=True)) for x in (found, wanted))
    assert_near(*pairs, NEAR)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, delta, packed):
    lengths = (100, 0, 33) if packed else (100, 100)
    case = Case(lengths, (2, 4, 16, 8), packed, delta, "gated", options=options(3, delta))
    tensors = case.make(dtype)
    found = results("native", tensors, **case.settings())
    wanted = expected(tensors, **case.settings())
    assert found["o"].dtype == dtype and found["state"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == dtype for name in tensors)
    assert_near(found, wanted, TOLERANCE[dtype])
    assert_near({"state": found["state"]}, {"state": wanted["state"]}, NEAR)


CASES = (
    Case((1, 1), (1, 2, 5, 3), decay="gated"),
    Case((40, 40), (2, 4, 5, 3), decay="gated", options=("qk_l2norm", "beta_sigmoid")),
    Case((130,), (1, 2, 20, 40), delta=False, decay="const", initial_state=False),
    Case((40, 0, 70, 1), (1, 2, 5, 3), packed=True, options=("allow_neg_eigval",)),
    Case((0, 0), (1, 2, 5, 3)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_nothing_it_has_not_written(case):
    tensors = case.make(torch.float32)
    clean = results("native", tensors, **case.settings())
    # What the thread keeps between calls is poisoned by inputs that are not numbers.
    results("native", {name: x * torch.nan for name, x in tensors.items()}, **case.settings())
    with poisoned():
        found = results("native", tensors, **case.settings())
        *_, chunks = call("native", tensors, return_chunk_states=True, **case.settings())
    assert chunks.isfinite().all()
    for name, x in clean.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_and_two_threads_give_the_same_bits(case, monkeypatch):
    monkeypatch.setattr(native, "PARALLEL", 0)
    tensors = case.make(torch.float32)
    threads = itertools.count(1)
    before = torch.get_num_threads()

    def run():
        torch.set_num_threads(next(threads))
        return results("native", tensors, **case.settings())

    try:
        assert_deterministic(run)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("T", [1, 70])
def test_a_row_alone_gives_the_same_bits_as_in_a_batch(T, delta):
    options = ("qk_l2norm", "beta_sigmoid") if delta else ("qk_l2norm",)
    case = Case((T,) * 9, (2, 4, 16, 16), delta=delta, decay="gated", options=options)
    tensors = case.make(torch.float32)
    together = gradients_by_row(tensors, options)
    for row in (0, 5, 8):
        shared = ("A_log", "dt_bias")
        alone = {n: x if n in shared else x[row : row + 1] for n, x in tensors.items()}
        for name, x in gradients_by_row(alone, options).items():
            assert torch.equal(x[0], together[name][row]), name


def gradients_by_row(tensors, options):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, state = call("native", leaves, return_state=True, **dict.fromkeys(options, True))
    own = {name: x for name, x in leaves.items() if x.ndim > 1}
    gradients = torch.autograd.grad(o.square().sum() + state.square().sum(), list(own.values()))
    found = {"o": o.detach(), "state": state.detach()}
    return found | dict(zip(own, gradients, strict=True))


@pytest.mark.parametrize("delta", [True, False])
def test_packed_sequences_give_the_bits_they_give_alone(delta):
    lengths = (5, 0, 130, 64, 1)
    case = Case(lengths, (1, 2, 16, 8), packed=True, delta=delta)
    tensors = case.make(torch.float32)
    together = results("native", tensors, **case.settings())
    start = 0
    for n, length in enumerate(lengths):
        alone = {
            name: x[n : n + 1] if name == "initial_state" else x[:, start : start + length]
            for name, x in tensors.items()
        }
        o, state = call("native", alone, return_state=True)
        assert torch.equal(o, together["o"][:, start : start + length])
        assert torch.equal(state[0], together["state"][n])
        start += length


@pytest.mark.parametrize("lengths, packed", [((150, 150), False), ((70, 0, 129, 1), True)])
def test_chunk_states(lengths, packed):
    case = Case(lengths, packed=packed)
    tensors = case.make(torch.float32)
    *_, found = call("native", tensors, return_chunk_states=True, **case.settings())
    exact = {name: x.double() for name, x in tensors.items()}
    *_, wanted = call("reference", exact, return_chunk_states=True, **case.settings())
    assert_near({"chunk states": found}, {"chunk states": wanted}, NEAR)
    if packed:
        slots = first_chunk_slots(case.settings()["cu_seqlens"])
        assert torch.equal(found[0, slots[0]], tensors["initial_state"][0])
        assert lengths[0] > CHUNK and not torch.equal(found[0, 1], torch.zeros_like(found[0, 1]))


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_opcheck(case):
    tensors = {name: x.requires_grad_() for name, x in case.make(torch.float32).items()}
    values = dict.fromkeys(operator.TENSORS) | tensors
    settings = case.settings()
    values["cu_seqlens"] = settings.pop("cu_seqlens", None)
    flags = [settings.get(name, False) for name in OPTIONS]
    arguments = (*(values[name] for name in operator.TENSORS), 0.5, *flags, True, True, "native")
    torch.library.opcheck(operator._forward, arguments)


def test_automatic_choice_compiles_whole(monkeypatch):
    monkeypatch.setenv("MEMLM_KERNELS", "auto")
    torch._dynamo.reset()
    tensors = Case((70,)).make(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(leaves):
        return linear_recurrence(**leaves)[0].sin()

    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    gradients = []
    for run in (compiled, lambda leaves: call("native", leaves)[0].sin()):
        gradients.append(torch.autograd.grad(run(leaves).sum(), list(leaves.values())))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


def test_a_step_in_place(monkeypatch):
    monkeypatch.setenv("MEMLM_KERNELS", "native")
    tensors = Case((1, 1), (2, 4, 16, 24)).make(torch.float32)
    o, state = call("native", tensors, return_state=True)
    given = tensors.pop("initial_state")
    found = linear_recurrence_step(**tensors, state=given)
    assert torch.equal(found, o) and torch.equal(given, state)


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="native is unavailable.*float64"):
        call("native", Case((3,)).make(torch.float64))


def test_nothing_is_compiled_where_another_implementation_is_forced(monkeypatch):
    def fail(source):
        raise AssertionError("it asks for the library")

    monkeypatch.setattr(loader, "unavailable", fail)
    monkeypatch.setattr(loader, "_tried", set())
    tensors = Case((3,)).make(torch.float32)
    call("eager", tensors)
    with pytest.raises(AssertionError, match="asks for"):
        call("native", tensors)
