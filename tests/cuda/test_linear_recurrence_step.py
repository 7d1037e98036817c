"""Single tokens with the state overwritten in place."""

import pytest
import torch

from memlm.cuda import linear_recurrence, linear_recurrence_step
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.linear_recurrence import operator
from tests.cuda.recurrence_cases import Case

CASES = [
    Case((1, 1, 1), (1, 2, 20, 24), decay="gated", options=("qk_l2norm", "beta_sigmoid")),
    Case((1, 1), (2, 2, 16, 16), delta=False, decay="const"),
    Case((1,), (1, 1, 16, 17), decay="none", options=("allow_neg_eigval",)),
]


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_recurrence_of_one_token(monkeypatch, case, implementation):
    tensors = {"log_decay": None, "beta": None} | case.make(torch.float32)
    monkeypatch.setenv(VARIABLE, "reference")
    o, last = linear_recurrence(**tensors, return_state=True, **case.settings())
    monkeypatch.setenv(VARIABLE, implementation)
    state = tensors.pop("initial_state")
    found = linear_recurrence_step(**tensors, state=state, **case.settings())
    torch.testing.assert_close(found, o)
    torch.testing.assert_close(state, last)


def test_opcheck():
    tensors = {"A_log": None, "dt_bias": None} | CASES[1].make(torch.float32)
    names = ("q", "k", "v", "log_decay", "beta", "initial_state", "A_log", "dt_bias")
    values = [tensors.get(name) for name in names]
    torch.library.opcheck(operator.step, (*values, 0.5, False, False, False, "eager"))


def test_compiles_whole():
    tensors = CASES[0].make(torch.float32)
    state = tensors.pop("initial_state")
    expected = state.clone()
    o = linear_recurrence_step(**tensors, state=expected, **CASES[0].settings())
    step = torch.compile(linear_recurrence_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(**tensors, state=state, **CASES[0].settings()), o)
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(3, 2, 20, 24).double()}, "contiguous torch.float32"),
        ({"state": torch.zeros(2, 3, 20, 24).transpose(0, 1)}, "contiguous"),
        ({"state": torch.zeros(3, 2, 20, 23)}, "initial_state is"),
    ],
)
def test_what_cannot_be_overwritten_is_refused(change, message):
    tensors = CASES[0].make(torch.float32)
    tensors["state"] = tensors.pop("initial_state")
    with pytest.raises(ValueError, match=message):
        linear_recurrence_step(**tensors | change)


def test_more_than_one_token_is_refused():
    tensors = Case((2,), (1, 1, 4, 4)).make(torch.float32)
    tensors["state"] = tensors.pop("initial_state")
    with pytest.raises(ValueError, match="one token per row, q has 2"):
        linear_recurrence_step(**tensors)
