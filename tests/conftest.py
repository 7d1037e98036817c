"""Settings every test runs under: offline, seeded, one thread, no trace in the home folder."""

import atexit
import os
import shutil
import tempfile

# Before transformers, datasets or huggingface_hub are imported: they read these once. Tests of the
# Hub start a subprocess with its own HF_ENDPOINT and HF_HOME instead.
_HF_HOME = tempfile.mkdtemp(prefix="memlm-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    XDG_CACHE_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, Triton kernels run in its interpreter; they read this when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings  # noqa: E402

from tests.memory.law_report import (  # noqa: E402, F401
    pytest_runtest_logreport,
    pytest_terminal_summary,
)

# A slow machine is no failure of the property; CI must give the same verdict twice.
settings.register_profile("memlm", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("memlm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
