"""The report in a real browser: what is seen, not what is written."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from memlm.evaluation.report import render_report
from tests.evaluation.example_results import drawn

CHROMIUM = shutil.which("chromium")
VIRIDIS_ENDS = ((253, 231, 36), (68, 1, 84))
LIGHT, DARK = (255, 255, 255), (0x16, 0x18, 0x1C)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(*drawn()), encoding="utf-8")
    return path


def screenshot(page, folder, width, height, *options) -> np.ndarray:
    """Pixels [height, width, 3] of the page."""
    picture = folder / "screen.png"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={picture}",
        f"--window-size={width},{height}",
        *options,
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(picture).convert("RGB"))


def colours(band: np.ndarray) -> int:
    return len(np.unique(band.astype(np.int32) @ [1 << 16, 1 << 8, 1]))


def count(seen: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((seen == colour).all(-1).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(
    ("width", "options", "background"),
    [
        (1200, (), LIGHT),
        # 0 is dark. A phone's width: nothing but tables and pictures may be wider.
        (500, ("--blink-settings=preferredColorScheme=0",), DARK),
    ],
    ids=["desktop", "phone, dark"],
)
def test_report_is_seen(page, tmp_path, width, options, background):
    seen = screenshot(page, tmp_path, width, 3000, *options)
    assert seen.shape == (3000, width, 3)
    assert tuple(seen[0, 0]) == background
    assert 0.5 < count(seen, background) / (3000 * width) < 0.97
    for top in range(0, 3000, 600):
        assert colours(seen[top : top + 600]) > 20, f"blank from {top} on"
    for colour in VIRIDIS_ENDS:
        assert count(seen, colour) > 1000
    # The margin at the right stays free: the page itself does not scroll sideways.
    assert (seen[:, -8:] == background).all()
    other = DARK if background == LIGHT else LIGHT
    assert count(seen, other) < 0.05 * count(seen, background)
