"""The operation through its Triton kernels, in Triton's interpreter, against the reference."""

import pytest
import torch

from memlm.cuda import neural_memory
from memlm.cuda.dispatch import VARIABLE, interpreting
from memlm.cuda.neural_memory.inputs import Rule, kernel_refusal
from tests.cuda.harness import assert_near
from tests.cuda.test_neural_memory import make, run

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize(
    "depth, options",
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (1, {"exact": True}),
        (1, {"read": "chunk_gates", "refresh": "never"}),
        (2, {"read": "chunk_gates", "refresh": 8}),
    ],
    ids=str,
)
def test_kernels_equal_the_reference(monkeypatch, depth, options):
    exact, options = options.get("exact", False), dict(options)
    inputs, state, boundaries = make(
        [9, 0, 5], depth, D=8, hidden=12, packed=True, offset=[3, 0, 2], exact=exact
    )
    options |= {"chunk_size": 4, "cu_seqlens": boundaries, "return_statistics": False}
    expected = run(monkeypatch, "reference", inputs, state, **options)
    narrow = {name: x.float() for name, x in inputs.items()}
    found = run(monkeypatch, "triton", narrow, state.map(torch.Tensor.float), **options)
    assert_near(found, expected, 3e-6)


@pytest.mark.parametrize(
    "depth, options, reason",
    [
        (3, {}, "3 layers"),
        (1, {"clip": 1.0}, "left to eager"),
        (1, {"read": "chunk_start"}, "left to eager"),
        (1, {"return_statistics": True}, "left to eager"),
    ],
)
def test_what_the_kernels_leave_to_eager(monkeypatch, depth, options, reason):
    inputs, state, _ = make([5], depth)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=reason):
        neural_memory(**inputs, state=state, chunk_size=4, **options)
    monkeypatch.setenv(VARIABLE, "auto")
    assert neural_memory(**inputs, state=state, chunk_size=4, **options)[0].isfinite().all()


@pytest.mark.parametrize(
    "depth, channels, dtype, reason",
    [
        (1, 257, torch.bfloat16, "heads of 257 channels: the kernels take up to 256"),
        (2, 65, torch.bfloat16, "heads of 65 channels: the kernels take up to 64"),
        (1, 16, torch.float32, "torch.float32 values are left to eager"),
        (1, 256, torch.float16, None),
        (2, 64, torch.bfloat16, None),
    ],
)
def test_values_that_the_kernels_refuse(monkeypatch, depth, channels, dtype, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, state, _ = make([1], depth, D=channels)
    rule = Rule.build(4, "inclusive", "chunk", False, None)
    found = kernel_refusal(inputs["v"].to(dtype), state, rule, False)
    assert found is None if reason is None else reason in found
