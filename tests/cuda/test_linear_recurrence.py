import itertools

import pytest
import torch

from memlm.cuda import linear_recurrence
from memlm.cuda.dispatch import VARIABLE

FLOAT64 = torch.float64


def make(lengths, H=1, HV=2, K=5, V=3, packed=False, seed=0, gate=1.0):
    """Random float64 inputs with unit keys; `lengths` packed in one row, or equal in a batch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=FLOAT64)

    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    inputs = {
        "q": normal(B, T, H, K),
        "k": torch.nn.functional.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, HV, V),
        "log_decay": -gate * normal(B, T, HV).abs(),
        "beta": 2 * normal(B, T, HV).sigmoid(),
        "initial_state": normal(len(lengths), HV, K, V),
    }
    boundaries = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    return inputs, boundaries


def run(monkeypatch, implementation, inputs, **arguments):
    """Outputs, final state, and gradients of a fixed random function of both."""
    monkeypatch.setenv(VARIABLE, implementation)
    leaves = {
        name: x.clone().requires_grad_() if x is not None else None for name, x in inputs.items()
    }
    o, state = linear_recurrence(**leaves, return_state=True, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (o, state)
    )
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(
        loss, list(present.values()), allow_unused=True, materialize_grads=True
    )
    results = {"o": o, "state": state}
    results |= {f"d{name}": x for name, x in zip(present, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def assert_equal(monkeypatch, inputs, tolerance=1e-9, **arguments):
    expected = run(monkeypatch, "reference", inputs, **arguments)
    got = run(monkeypatch, "eager", inputs, **arguments)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("T", [0, 1, 2, 37, 64, 150])
def test_eager_equals_reference(monkeypatch, T):
    inputs, _ = make([T, T])
    assert_equal(monkeypatch, inputs)


@pytest.mark.parametrize(
    "lengths", [[5], [3, 0, 70, 1, 129, 0], [0, 0], [1, 1, 1], [1, 0, 1], [64, 128]]
)
def test_packed_sequences(monkeypatch, lengths):
    inputs, boundaries = make(lengths, packed=True)
    assert_equal(monkeypatch, inputs, cu_seqlens=boundaries)


def test_packed_equals_one_by_one():
    inputs, boundaries = make([9, 0, 80, 1], packed=True)
    together, states = linear_recurrence(**inputs, cu_seqlens=boundaries, return_state=True)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        part = {name: x[:, start:end] for name, x in inputs.items() if name != "initial_state"}
        state = inputs["initial_state"][i : i + 1]
        alone, last = linear_recurrence(**part, initial_state=state, return_state=True)
        torch.testing.assert_close(together[:, start:end], alone)
        torch.testing.assert_close(states[i : i + 1], last)


@pytest.mark.parametrize("missing", [["beta"], ["log_decay"], ["beta", "log_decay"]])
def test_without_delta_rule_or_decay(monkeypatch, missing):
    inputs, _ = make([70, 70])
    assert_equal(monkeypatch, inputs | dict.fromkeys(missing), scale=1.0)
    one_token, _ = make([1, 1])
    assert_equal(monkeypatch, one_token | dict.fromkeys(missing))


def test_plain_additive_is_causal_linear_attention():
    inputs, _ = make([40], HV=1)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    o, _ = linear_recurrence(q, k, v, None, None, scale=0.5)
    scores = 0.5 * torch.einsum("bthd,bshd->bhts", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhts,bshd->bthd", scores, v))


def test_constant_decay_per_head(monkeypatch):
    inputs, _ = make([70, 70])
    assert_equal(monkeypatch, inputs | {"log_decay": torch.tensor([-0.1, -0.02], dtype=FLOAT64)})


def test_grouped_value_heads_and_no_initial_state(monkeypatch):
    inputs, _ = make([70, 70], H=2, HV=6)
    assert_equal(monkeypatch, inputs | {"initial_state": None})


def test_strong_gates_and_duplicate_keys(monkeypatch):
    inputs, _ = make([130], gate=30.0)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["log_decay"][:, ::7] = -50.0
    inputs["log_decay"][:, ::3] = 0.0
    inputs["beta"][:, ::5] = 0.0
    inputs["beta"][:, 1::5] = 2.0
    assert_equal(monkeypatch, inputs, tolerance=1e-8)


def test_a_decay_of_minus_infinity_forgets_everything_and_stays_finite(monkeypatch):
    inputs, _ = make([70])
    inputs["log_decay"][:, 40] = -torch.inf
    results = run(monkeypatch, "eager", inputs)
    assert all(x.isfinite().all() for x in results.values())
    rest = {name: x[:, 40:] for name, x in inputs.items() if name != "initial_state"}
    alone, _ = linear_recurrence(**rest)
    torch.testing.assert_close(results["o"][:, 40:], alone)


def test_ragged_splits_carry_the_state():
    inputs, _ = make([97])
    whole, last = linear_recurrence(**inputs, return_state=True)
    state = inputs.pop("initial_state")
    start, pieces = 0, []
    for length in (1, 5, 1, 64, 0, 26):
        part = {name: x[:, start : start + length] for name, x in inputs.items()}
        o, state = linear_recurrence(**part, initial_state=state, return_state=True)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


def test_non_contiguous_inputs(monkeypatch):
    inputs, _ = make([40, 40])
    inputs = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert_equal(monkeypatch, inputs)


def test_low_precision_inputs_keep_a_float32_state():
    inputs, _ = make([70])
    low = {name: x.bfloat16() for name, x in inputs.items()}
    o, state = linear_recurrence(**low, return_state=True)
    exact, _ = linear_recurrence(**{name: x.double() for name, x in low.items()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(o.double(), exact, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = linear_recurrence(**{name: x.float() for name, x in low.items()})
    torch.testing.assert_close(inside.double(), exact, rtol=1e-4, atol=1e-4)


def test_state_only_on_request():
    inputs, _ = make([3])
    assert linear_recurrence(**inputs)[1] is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 3, 1, 4)}, "q is .* but k is"),
        ({"v": torch.zeros(1, 2, 2, 3)}, "v is"),
        ({"q": torch.zeros(1, 3, 3, 5), "k": torch.zeros(1, 3, 3, 5)}, "a multiple of 3"),
        ({"log_decay": torch.zeros(5)}, "log_decay is"),
        ({"beta": torch.zeros(1, 3, 1)}, "beta is"),
        ({"initial_state": torch.zeros(2, 2, 5, 3)}, "initial_state is"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
    ],
)
def test_shapes_are_checked(change, message):
    inputs, _ = make([3])
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**inputs | change)
