"""The Triton kernels on a real card, against the readable formulas in float64.

Run by `python -m benchmarks.gpu_check`, or `pytest -m gpu tests/cuda`; skipped without a GPU.
"""

import pytest
import torch

from memlm.cuda import diagonal_scan, linear_recurrence, short_convolution
from memlm.cuda.dispatch import VARIABLE
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (3, 0, 70, 1, 129, 0, 300)


def normal(*shape, dtype=FP32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def recurrence_inputs(
    lengths, K=128, V=128, dtype=BF16, H=2, groups=1, packed=False, delta=True, decay="gate"
):
    """As a gated delta layer calls the operation: raw q, k, gates and write strengths."""
    HV = H * groups
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    shapes = {"none": None, "constant": (HV,)}
    gate = shapes.get(decay, (B, T, HV))
    inputs = {
        "q": normal(B, T, H, K, dtype=dtype, seed=1),
        "k": normal(B, T, H, K, dtype=dtype, seed=2),
        "v": normal(B, T, HV, V, dtype=dtype, seed=3),
        "log_decay": None if gate is None else normal(*gate, seed=4),
        "beta": normal(B, T, HV, seed=5) if delta else None,
        "initial_state": normal(len(lengths), HV, K, V, seed=6),
        "A_log": normal(HV, seed=7) if decay == "gate" else None,
        "dt_bias": normal(HV, seed=8) - 3 if decay == "gate" else None,
    }
    if decay in ("scalar", "constant"):
        inputs["log_decay"] = -0.1 * inputs["log_decay"].abs()
    if not delta:  # what is only ever added to must not be of random sign, or it cancels
        inputs["k"] = inputs["k"].abs()
    options = {"qk_l2norm": True, "beta_sigmoid": delta, "return_state": True}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return inputs, options


def convolution_inputs(lengths, D=384, dtype=BF16, width=4, packed=False, parts=True):
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    inputs = {
        "x": normal(B, T, D, dtype=dtype, seed=1),
        "weight": normal(D, 1, width, dtype=dtype, seed=2),
        "tail": normal(len(lengths), width - 1, D, dtype=dtype, seed=3),
    }
    options = {"split": ((1, D // 3, True), (1, D // 3, True), (2, D // 6, False))}
    options = options if parts else {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return inputs, options


def scan_inputs(lengths, D=200, dtype=BF16, packed=False, wide=True):
    """Coefficients in [-1, 1], in float32 where wide; channels that fill no block."""
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    inputs = {
        "a": normal(B, T, D, seed=1).tanh().to(FP32 if wide else dtype),
        "b": normal(B, T, D, dtype=dtype, seed=2),
        "initial_state": normal(len(lengths), D, seed=3),
    }
    options = {"return_state": True}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return inputs, options


def outputs_of(function, inputs, options):
    """All outputs by number, flat."""
    found = function(**inputs, **options)
    flat = []
    for part in found:
        flat += part if isinstance(part, tuple | list) else [part]
    return {f"output {i}": x for i, x in enumerate(flat) if x is not None}


def run(function, inputs, options):
    """Outputs, and the gradients of a fixed random function of them."""
    leaves = {
        name: x.detach().clone().requires_grad_() if x is not None else None
        for name, x in inputs.items()
    }
    outputs = outputs_of(function, leaves, options)
    loss = sum(
        (x.double() * normal(*x.shape, seed=99 + i)).sum() for i, x in enumerate(outputs.values())
    )
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(present.values()))
    named = {f"d{name}": x for name, x in zip(present, gradients, strict=True)}
    return {name: x.detach() for name, x in (outputs | named).items()}


def exact(monkeypatch, function, inputs, options):
    """The same in float64 by the readable formula."""
    wide = {name: x.double() if x is not None else None for name, x in inputs.items()}
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "reference")
        return run(function, wide, options)


def assert_right(monkeypatch, function, inputs, options, dtype):
    with poisoned():
        found = run(function, inputs, options)
    assert all(x.isfinite().all() for x in found.values())
    # Gates' gradients are small differences of large sums.
    gates = {"dlog_decay", "dbeta", "dA_log", "dt_bias", "ddt_bias"}
    expected = exact(monkeypatch, function, inputs, options)
    for names, factor in ((expected.keys() - gates, 1), (expected.keys() & gates, 2)):
        assert_near(
            {name: found[name] for name in names},
            {name: expected[name] for name in names},
            factor * TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (128, 256), (256, 256), (24, 40)])
def test_recurrence_sizes_and_types(gpu, monkeypatch, K, V, dtype):
    inputs, options = recurrence_inputs([150, 150], K, V, dtype)
    assert_right(monkeypatch, linear_recurrence, inputs, options, dtype)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "gate"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_recurrence_rules_and_decays(gpu, monkeypatch, delta, decay, dtype):
    inputs, options = recurrence_inputs([130, 130], 64, 128, dtype, delta=delta, decay=decay)
    assert_right(monkeypatch, linear_recurrence, inputs, options, dtype)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_recurrence_packed_and_grouped(gpu, monkeypatch, groups, dtype):
    inputs, options = recurrence_inputs(RAGGED, 128, 128, dtype, groups=groups, packed=True)
    assert_right(monkeypatch, linear_recurrence, inputs, options, dtype)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65])
def test_recurrence_lengths(gpu, monkeypatch, T):
    inputs, options = recurrence_inputs([T, T], 128, 256)
    assert_right(monkeypatch, linear_recurrence, inputs, options, BF16)


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_sequence_is_the_whole_one(gpu, monkeypatch, packed):
    lengths = (5000, 0, 3192) if packed else (8192,)
    inputs, options = recurrence_inputs(lengths, 128, 128, FP16, packed=packed)
    split = run(linear_recurrence, inputs, options)
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    whole = run(linear_recurrence, inputs, options)
    assert_near(split, whole, TOLERANCE[FP16])


def test_calls_may_be_cut_anywhere(gpu):
    inputs, options = recurrence_inputs([300, 300], 128, 128, FP16)
    whole, last = linear_recurrence(**inputs, **options)
    of_tokens = ("q", "k", "v", "log_decay", "beta")
    state, pieces, start = inputs["initial_state"], [], 0
    for length in (1, 1, 62, 100, 1, 135):
        part = {name: inputs[name][:, start : start + length] for name in of_tokens}
        o, state = linear_recurrence(**inputs | part | {"initial_state": state}, **options)
        pieces.append(o)
        start += length
    found = {"o": torch.cat(pieces, 1), "state": state}
    assert_near(found, {"o": whole, "state": last}, TOLERANCE[FP16])


def test_strong_gates_and_equal_keys_stay_finite(gpu, monkeypatch):
    inputs, options = recurrence_inputs([200], 128, 128, FP16, decay="scalar")
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["log_decay"][:, ::7] = -50.0
    options["allow_neg_eigval"] = True
    with poisoned():
        found = run(linear_recurrence, inputs, options)
    expected = exact(monkeypatch, linear_recurrence, inputs, options)
    assert all(x.isfinite().all() for x in found.values())
    names = ("output 0", "output 1", "dv", "dinitial_state")
    assert_near({n: found[n] for n in names}, {n: expected[n] for n in names}, TOLERANCE[FP16])


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_give_the_same_bits(gpu, packed):
    lengths = RAGGED if packed else (512, 512)
    for function, (inputs, options) in (
        (linear_recurrence, recurrence_inputs(lengths, groups=4, packed=packed)),
        (short_convolution, convolution_inputs(lengths, packed=packed)),
        (diagonal_scan, scan_inputs(lengths, packed=packed)),
    ):
        assert_deterministic(lambda f=function, i=inputs, o=options: run(f, i, o))


def test_a_row_does_not_depend_on_its_neighbours(gpu, monkeypatch):
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    inputs, options = recurrence_inputs([256] * 8)
    per_row = {"q", "k", "v", "log_decay", "beta", "initial_state"}
    alone = {name: x[3:4].contiguous() if name in per_row else x for name, x in inputs.items()}
    together, states = linear_recurrence(**inputs, **options)
    o, state = linear_recurrence(**alone, **options)
    assert torch.equal(o, together[3:4]) and torch.equal(state, states[3:4])


def test_more_programs_than_a_grid_dimension_allows(gpu, monkeypatch):
    rows = 70_000
    inputs, options = recurrence_inputs([2] * rows, 16, 16, FP16, H=1)
    found = run(linear_recurrence, inputs, options)
    expected = exact(monkeypatch, linear_recurrence, inputs, options)
    per_row = ("output 0", "output 1", "dq", "dk", "dv")
    last = {name: expected[name][-9:] for name in per_row}
    assert_near({name: found[name][-9:] for name in per_row}, last, TOLERANCE[FP16])
    x, _ = convolution_inputs([2] * rows, D=16, dtype=FP32, parts=False)
    expected = exact(monkeypatch, short_convolution, x, {})
    assert_near(run(short_convolution, x, {}), expected, 1e-4)


def test_offsets_beyond_32_bits(gpu, monkeypatch):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free >> 30}")
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    inputs, options = recurrence_inputs([33_000] * 4, 16, 256, H=1, groups=64)
    assert inputs["v"].numel() > 2**31
    per_row = {"q", "k", "v", "log_decay", "beta", "initial_state"}
    with torch.no_grad():
        together, states = linear_recurrence(**inputs, **options)
        alone = {name: x[3:] if name in per_row else x for name, x in inputs.items()}
        o, state = linear_recurrence(**alone, **options)
    assert torch.equal(o, together[3:]) and torch.equal(state, states[3:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_short_convolution(gpu, monkeypatch, packed, parts, dtype):
    lengths = RAGGED if packed else (150, 150)
    inputs, options = convolution_inputs(lengths, dtype=dtype, packed=packed, parts=parts)
    assert_right(monkeypatch, short_convolution, inputs, options, dtype)


@pytest.mark.parametrize("T", [1, 2, 3, 65])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_short_convolution_lengths_and_widths(gpu, monkeypatch, T, width):
    inputs, options = convolution_inputs([T, T], dtype=FP32, width=width)
    assert_right(monkeypatch, short_convolution, inputs, options, FP32)


def test_short_convolution_of_a_view(gpu):
    inputs, options = convolution_inputs([100, 100], dtype=FP32)
    wide = torch.cat((normal(2, 100, 7), inputs["x"], normal(2, 100, 5)), -1)
    view = wide[..., 7 : 7 + inputs["x"].shape[-1]]
    for found, expected in zip(
        outputs_of(short_convolution, inputs | {"x": view}, options).values(),
        outputs_of(short_convolution, inputs, options).values(),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_diagonal_scan(gpu, monkeypatch, packed, wide, dtype):
    lengths = RAGGED if packed else (150, 150)
    inputs, options = scan_inputs(lengths, dtype=dtype, packed=packed, wide=wide)
    assert_right(monkeypatch, diagonal_scan, inputs, options, dtype)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 65])
@pytest.mark.parametrize("D", [1, 64, 1024])
def test_diagonal_scan_lengths_and_widths(gpu, monkeypatch, T, D):
    inputs, options = scan_inputs([T, T], D, FP32)
    assert_right(monkeypatch, diagonal_scan, inputs, options, FP32)


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_diagonal_scan_is_the_whole_one(gpu, monkeypatch, packed):
    lengths = (2000, 0, 1, 1695, 128, 256) if packed else (4080,)
    inputs, options = scan_inputs(lengths, dtype=FP32, packed=packed)
    inputs["a"] = 1 - 1e-3 * inputs["a"].abs()  # so that every slot matters to the next
    split = run(diagonal_scan, inputs, options)
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    assert_near(split, run(diagonal_scan, inputs, options), TOLERANCE[FP32])


def test_a_row_of_a_diagonal_scan_does_not_depend_on_its_neighbours(gpu, monkeypatch):
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    inputs, options = scan_inputs([300] * 8)
    together, states = diagonal_scan(**inputs, **options)
    alone = {name: x[3:4].contiguous() for name, x in inputs.items()}
    h, state = diagonal_scan(**alone, **options)
    assert torch.equal(h, together[3:4]) and torch.equal(state, states[3:4])


def test_a_diagonal_scan_of_very_many_rows(gpu, monkeypatch):
    inputs, options = scan_inputs([2] * 70_000, 16, FP32)
    found = run(diagonal_scan, inputs, options)
    last = {name: x[-9:] for name, x in found.items()}
    expected = exact(monkeypatch, diagonal_scan, inputs, options)
    assert_near(last, {name: x[-9:] for name, x in expected.items()}, TOLERANCE[FP32])


def test_a_diagonal_scan_beyond_32_bits(gpu, monkeypatch):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free >> 30}")
    monkeypatch.setenv("MEMLM_SEQUENCE_SPLIT", "0")
    inputs, options = scan_inputs([33_000] * 4, 1 << 14, FP16, wide=False)
    assert inputs["b"].numel() > 2**31
    with torch.no_grad():
        together, states = diagonal_scan(**inputs, **options)
        h, state = diagonal_scan(**{name: x[3:] for name, x in inputs.items()}, **options)
    assert torch.equal(h, together[3:]) and torch.equal(state, states[3:])
