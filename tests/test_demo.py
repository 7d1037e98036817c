"""The demo: table and results.json at a tiny size, and (slow) its promise on three seeds."""

import itertools
import json
from pathlib import Path

import pytest

from memlm import demo
from memlm.config import load_config
from memlm.demo import format_results, main, run_demo

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
CONDITIONS = {"on", "off", "reset", "swapped"}
TINY = [
    "--config",
    str(CONFIG),
    "--train.steps=4",
    "--train.tokens_per_step=256",
    "--train.curriculum=[{length: 128, window: 16}]",
    "--train.evaluation_rows=2",
    "--model.hidden_size=32",
    "--model.layers.0.repeat=1",
    "--model.layers.0.mixer.window=32",
    "--evaluate.lengths=[128, 192]",
    "--evaluate.trials=4",
    "--evaluate.needle={depths: 2}",
]


@pytest.mark.usefixtures("no_pictures")
def test_demo_writes_its_numbers_and_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(TINY) == 0
    results = json.loads(Path("runs/demo/results.json").read_text())
    assert set(results["needle"]) == {"128", "192"}
    assert set(results["needle"]["192"]) == CONDITIONS
    assert set(results["bits_per_byte"]) == {"before", "after", "after_memory_off"}
    assert results["seconds"]["total"] > results["seconds"]["training"] > 0
    assert Path(results["report"]).is_file()
    printed = capsys.readouterr().out
    for part in ("memory swapped", "bits per byte", "tokens/s", "bytes of memory", "report.html"):
        assert part in printed

    results["needle"] = {"192": {"on": 1.0, "changed": 0.5}}
    results["needle_intervals"] = {"192": {"on": [0.5, 1.0], "changed": [0.2, 0.8]}}
    (head,) = [line for line in format_results(results).splitlines() if line[:6] == "tokens"]
    assert head.split() == ["tokens", "memory", "on", "changed", "prompt"]
    results = json.loads(Path("runs/demo/results.json").read_text())

    # A second demo leaves the first one alone.
    folders = []

    def watched(config, command):
        folders.append(config.output_dir)
        return results

    monkeypatch.setattr(demo, "run_demo", watched)
    assert main(TINY) == 0
    assert folders == [Path("runs/demo-2")]


def test_demo_needs_needles(tmp_path, capsys):
    words = [*TINY, "--evaluate.tasks=[mqar]", f"--train.output_dir={tmp_path / 'run'}"]
    assert main(words) == 2
    assert "task needle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_finds_its_needles_with_the_memory_only(seed, tmp_path):
    overrides = [
        f"--train.seed={seed}",
        f"--data.seed={seed}",
        f"--train.output_dir={tmp_path / 'demo'}",
    ]
    results = run_demo(load_config(CONFIG, overrides))
    print(f"\nseed {seed}: {results['needle']} {results['bits_per_byte']} {results['seconds']}")
    assert results["trials_per_length"] >= 96
    assert results["needle"]["4096"]["on"] >= 0.95
    for length, condition in itertools.product(results["needle"], CONDITIONS - {"on"}):
        assert results["needle"][length][condition] <= 0.05  # chance is one in 100,000
    bits = results["bits_per_byte"]
    assert bits["after"] < min(bits["before"], bits["after_memory_off"])
