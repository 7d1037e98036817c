"""What every operation is tested with: errors relative to float64, poison, equality of runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

# Relative root mean square error allowed against the float64 reference.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 1e-2,
}


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected` (over 1 where that is zero)."""
    found, expected = found.double(), expected.double()
    scale = expected.square().mean().sqrt()
    error = (found - expected).square().mean().sqrt()
    return float(error / scale if scale > 0 else error)


def assert_near(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Raise AssertionError where a tensor of `found` differs from its namesake of `expected`."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        if tensor.numel():
            error = relative_rms(tensor, expected[name])
            assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance:.0e}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every newly allocated buffer with NaN, so that reading before writing shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def scattered(tensor: Tensor) -> Tensor:
    """The same values with every dimension's stride doubled: a view that is not contiguous."""
    wide = tensor.new_full([2 * size for size in tensor.shape], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def assert_deterministic(run: Callable[[], Mapping[str, Tensor]]) -> None:
    """Raise AssertionError unless two runs give the same bits."""
    first, second = run(), run()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"
