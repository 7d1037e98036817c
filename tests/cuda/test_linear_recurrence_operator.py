"""The recurrence as a torch operation: its custom op, torch.compile, buffers, chunk states."""

import dataclasses

import pytest
import torch

from memlm.cuda import linear_recurrence
from memlm.cuda.linear_recurrence import CHUNK, first_chunk_slots, operator
from memlm.cuda.linear_recurrence.inputs import Inputs
from tests.cuda.harness import assert_deterministic, assert_near, poisoned
from tests.cuda.recurrence_cases import Case, call, results, weighted

CASES = (
    Case((1, 1), (1, 2, 5, 3), decay="gated"),
    Case((40, 40), (2, 4, 5, 3), decay="gated", options=("qk_l2norm", "beta_sigmoid")),
    Case((70,), (1, 1, 4, 4), delta=False, decay="const", initial_state=False),
    Case((40,), (1, 2, 5, 3), decay="none"),
    Case((40, 0, 70, 1), (1, 2, 5, 3), packed=True, options=("allow_neg_eigval",)),
    Case((1, 1, 1), (1, 2, 5, 3), packed=True),
    Case((33, 5), (2, 2, 5, 3), packed=True, delta=False),
    Case((0, 0), (1, 2, 5, 3)),
)
# With every argument, without what may be missing, packed, and without tokens.
CHECKED = (CASES[1], CASES[2], CASES[4], CASES[7])


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple:
    """What the custom op takes, as `Inputs` has it, with all tensors asking for gradients."""
    tensors = {name: x.requires_grad_() for name, x in case.make(dtype).items()}
    missing = dict.fromkeys(operator.TENSORS)
    inputs = Inputs(**missing | tensors | case.settings(), scale=0.5)
    return tuple(getattr(inputs, field.name) for field in dataclasses.fields(inputs))


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case):
    torch.library.opcheck(operator._forward, (*arguments(case), True, True, "eager"))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=str)
def test_opcheck_without_gradients(case):
    without_gradients = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(case)]
    torch.library.opcheck(operator._forward, (*without_gradients, False, False, "eager"))


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck_of_the_backward_op(case):
    values = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(case)]
    with torch.no_grad():
        o, state, _, saved = operator._forward(*values, False, True, "eager")
    torch.library.opcheck(
        operator._backward,
        (*values, saved, torch.randn_like(o), torch.randn_like(state), "eager"),
    )


def test_without_gradients_nothing_is_saved():
    values = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(CASES[1])]
    *_, saved = operator._forward(*values, False, False, "eager")
    assert saved == []


@pytest.mark.parametrize(
    ("case", "dynamic"),
    [(CASES[1], True), (CASES[2], False), (CASES[4], True)],
    ids=str,
)
def test_compiles_whole(case, dynamic):
    torch._dynamo.reset()
    settings = case.settings()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(leaves):
        o, state = linear_recurrence(
            **{"log_decay": None, "beta": None} | leaves, return_state=True, **settings
        )
        return o.sin(), state.cos()

    tensors = case.make()
    expected = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, state = call("eager", expected, return_state=True, **settings)
    weighted(o.sin(), state.cos()).backward()
    found = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    weighted(*compiled(found)).backward()
    for name, x in found.items():
        torch.testing.assert_close(x.grad, expected[name].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_nothing_it_has_not_written(case):
    tensors = case.make()
    clean = results("eager", tensors, **case.settings())
    with poisoned():
        found = results("eager", tensors, **case.settings())
        *_, chunks = call("eager", tensors, return_chunk_states=True, **case.settings())
    assert chunks.isfinite().all()
    for name, x in clean.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_give_the_same_bits(case):
    tensors = case.make(torch.float32)
    assert_deterministic(lambda: results("eager", tensors, **case.settings()))


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
    """Outputs, states and the gradients of what each row has of its own, for sums of squares."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, state = call("eager", leaves, return_state=True, **dict.fromkeys(options, True))
    own = {name: x for name, x in leaves.items() if x.ndim > 1}
    gradients = torch.autograd.grad(o.square().sum() + state.square().sum(), list(own.values()))
    found = {"o": o.detach(), "state": state.detach()}
    return found | dict(zip(own, gradients, strict=True))


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(
    "lengths, packed",
    [
        ((0, 0), False),
        ((1, 1), False),
        ((64, 64), False),
        ((150, 150), False),
        ((5, 0, 3), True),
        ((1, 1, 1), True),
        ((200, 0, 64, 65, 1, 130), True),
    ],
)
def test_chunk_states(lengths, packed, delta):
    case = Case(lengths, (1, 2, 5, 3), packed, delta, decay="gated")
    tensors = case.make()
    *_, expected = call("reference", tensors, return_chunk_states=True, **case.settings())
    for save in (False, True):
        leaves = {name: x.clone().requires_grad_(save) for name, x in tensors.items()}
        _, state, found = call("eager", leaves, return_chunk_states=True, **case.settings())
        assert state is None
        assert_near({"chunks": found.detach()}, {"chunks": expected}, 1e-10)


def test_a_chunk_state_resumes_the_recurrence():
    tensors = Case((150,), (1, 2, 5, 3)).make()
    o, state, chunks = call("eager", tensors, return_state=True, return_chunk_states=True)
    rest = {name: x[:, 2 * CHUNK :] for name, x in tensors.items() if name != "initial_state"}
    resumed, last = call("eager", rest | {"initial_state": chunks[:, 2]}, return_state=True)
    torch.testing.assert_close(resumed, o[:, 2 * CHUNK :])
    torch.testing.assert_close(last, state)


def test_slots_of_packed_chunk_states():
    case = Case((200, 0, 65), (1, 1, 4, 4), packed=True)
    cu_seqlens = case.settings()["cu_seqlens"]
    assert first_chunk_slots(cu_seqlens).tolist() == [0, 4, 5]
    *_, chunks = call("eager", case.make(), return_chunk_states=True, **case.settings())
    assert chunks.shape == (1, 265 // CHUNK + 3, 1, 4, 4)
    assert chunks[0].flatten(1).any(1).tolist() == [True] * 4 + [False] + [True] * 2


def test_many_sequences_of_many_lengths():
    lengths = tuple((7 * n) % 90 for n in range(40))
    case = Case(lengths, (2, 4, 4, 4), packed=True, decay="gated")
    tensors = case.make()
    together = results("eager", tensors, **case.settings())
    start = 0
    for n, length in enumerate(lengths):
        part = {name: x[:, start : start + length] for name, x in tensors.items() if x.ndim > 2}
        part |= {name: x for name, x in tensors.items() if x.ndim == 1}
        part["initial_state"] = tensors["initial_state"][n : n + 1]
        o, state = call("eager", part, return_state=True)
        torch.testing.assert_close(together["o"][:, start : start + length], o)
        torch.testing.assert_close(together["state"][n : n + 1], state)
        start += length


def test_more_rows_than_a_segment_takes():
    case = Case((70,) * 70, (1, 8, 64, 64), decay="none")
    tensors = case.make(torch.float32)
    o, state = call("eager", tensors, return_state=True)
    for row in (0, 37, 69):
        alone, last = call(
            "eager", {name: x[row : row + 1] for name, x in tensors.items()}, return_state=True
        )
        torch.testing.assert_close(o[row : row + 1], alone)
        torch.testing.assert_close(state[row : row + 1], last)


def test_the_inputs_are_left_as_they_are():
    for case in CASES:
        tensors = case.make()
        before = {name: x.clone() for name, x in tensors.items()}
        results("eager", tensors, **case.settings())
        for name, x in tensors.items():
            assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("boundaries", [[1, 3], [0, 2], [0, 3, 1, 3]])
def test_boundaries_must_cover_the_row_in_order(boundaries):
    tensors = Case((3,), (1, 1, 4, 4), initial_state=False).make()
    with pytest.raises(ValueError, match="cu_seqlens"):
        call("eager", tensors, cu_seqlens=torch.tensor(boundaries))
