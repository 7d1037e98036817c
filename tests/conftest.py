"""Settings every test runs under: offline, seeded, one thread, no trace in the home folder."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before transformers, datasets or huggingface_hub are imported: they read these once. Tests of the
# Hub start a subprocess with its own HF_ENDPOINT and HF_HOME instead.
_HF_HOME = tempfile.mkdtemp(prefix="memlm-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
# Libraries of C++ are kept here: what one of several processes compiles serves the others.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = _HF_HOME
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


# Counting lines makes Python two to three times slower. The memories and the models have to be
# covered by their own tests, so no others are counted.
COVERING = {"layers", "memory", "models"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of everything else out of the coverage."""
    if not config.pluginmanager.hasplugin("_cov"):
        return
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] not in COVERING:
            item.add_marker(pytest.mark.no_cover)


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, that of pytest-cov for where it is not loaded."""
    config.addinivalue_line("markers", "native(*sources): needs the libraries of these C++ files")
    config.addinivalue_line("markers", "no_cover: its lines are not counted")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose library there is not.

    Asking compiles it: while tests are collected, each of several processes would compile all.
    """
    for marker in item.iter_markers("native"):
        from memlm.cuda import native  # the process that only reports imports nothing of memlm

        for source in marker.args:
            reason = native.unavailable(source)
            if reason is not None:
                pytest.skip(f"native: {reason}")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations write reports without pictures, which take seconds to draw."""
    monkeypatch.setattr("memlm.evaluation.plots.draw_plots", lambda results, dark=False: {})


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
