"""What GPU tests need; they also run where only this folder's conftest can be loaded."""

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """The GPU; without one the test is skipped. Triton's kernels are forced on it."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    torch.manual_seed(0)
    monkeypatch.setenv("MEMLM_KERNELS", "triton")
    return torch.device("cuda")
