"""Curves of runs side by side: `python -m memlm.training.plot`."""

import json
import math
import re
from pathlib import Path

import pytest

from memlm.training import Trainer
from memlm.training.logs import LN2, METRICS_FILE
from memlm.training.plot.__main__ import main
from memlm.training.plot.draw import run_colours
from memlm.training.plot.panels import panels
from memlm.training.plot.runs import LONG, Curve, mean_curve, read_runs, run_names, smoothed

PNG = b"\x89PNG\r\n"


def step(number, **more):
    bits = 8.0 / number
    record = {"step": number, "loss": bits * LN2, "bits": bits, "text_bits": bits}
    record |= {"learning_rate": 1e-3, "grad_norm": 1.0, "skipped_steps": 0, "stage": 0}
    return record | {"length": 64, "window": None, "tokens_per_second": 100.0} | more


def evaluation(number, **more):
    return {"step": number, "evaluation": True, "bits": 5.0, "text_bits": 5.0} | more


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, records, end)`: a run folder; `end` is added as it is."""

    def make(name="run", records=(), end="") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / METRICS_FILE).write_text(lines + end)
        return folder

    return make


def by_title(folders):
    return {panel.title: panel for panel in panels(read_runs(folders))}


def values(panel, run=0, kind="training", site=None):
    (line,) = (x for x in panel.lines if (x.run, x.kind, x.site) == (run, kind, site))
    return line.curve.values


def test_losses_with_and_without_memory_and_recall_have_their_panels(make_run):
    off = {"bits_off": 5.5, "text_bits_off": 5.5, "bits_difference": 0.5}
    recall = {"needle/2048/on": 0.75, "needle/2048/off": 0.0}
    loss = {"perplexity/all/on": 2.0, "perplexity/1-15/on": 3.0}
    with_memory = make_run("a", [step(1), evaluation(1, **off, **recall, **loss), step(2)])
    without = make_run("b", [evaluation(0), step(1), evaluation(1, **{"needle/2048/on": 0.5})])
    found = by_title([with_memory, without])
    assert values(found["Loss"]) == [8.0, 4.0]
    assert values(found["Loss"], 1, "held-out") == [5.0, 5.0]
    assert values(found["What the memory saves"], 0, "held-out") == [0.5]
    both = found["Held-out loss, on and off"]
    assert [(line.run, line.kind) for line in both.lines] == [(0, "on"), (0, "off")]
    assert values(both, kind="off") == [5.5]
    needle = found["needle at 2k"]
    assert values(needle, 1, "on") == [0.5] and values(needle, 0, "off") == [0.0]
    assert needle.unit == "% right" and needle.factor == 100
    assert values(found["perplexity"], kind="on") == [2.0]
    assert found["perplexity"].unit == "bits per byte"
    assert not any("1-15" in title or "text, on and off" in title for title in found)


def test_groups_and_sources_and_weights_have_losses_of_their_own(make_run):
    sources = {"source/text/bits": 3.0, "source/text.2/bits": 4.0}
    folder = make_run("a", [step(1, answer_bits=2.0, loss=9.0, **sources)])
    found = by_title([folder])
    names = ["Loss, text", "Loss, answer", "Loss, all targets", "Weighted loss that is trained"]
    names += ["Loss, source text", "Loss, source text.2"]
    assert [title for title, panel in found.items() if panel.section == "Loss"] == names
    assert values(found["Loss, source text.2"]) == [4.0]


def test_memories_share_a_panel_per_metric(make_run):
    sites = {"layers.0.memory.gate_mean": 0.2, "layers.1.memory.gate_mean": 0.4}
    one = make_run("one", [step(1, **sites, **{"output.fill": 0.5, "layers.0.memory.odd": 7})])
    two = make_run("two", [step(1)])
    alone = by_title([one])["Size of the gates"]
    assert [line.site for line in alone.lines] == ["layers.0.memory", "layers.1.memory", None]
    assert values(alone) == pytest.approx([0.3])
    together = by_title([one, two])
    assert [line.site for line in together["Size of the gates (mean)"].lines] == [None]
    assert values(together["Size of the gates (mean)"]) == pytest.approx([0.3])
    assert together["Filled slots of the stores"].shares
    assert values(together["odd"]) == [7]


def test_what_says_nothing_has_no_panel_and_what_is_unknown_has_one(make_run):
    found = by_title([make_run("a", [step(1, new_metric=3.5, mfu=None), step(2)])])
    assert values(found["new metric"]) == [3.5]
    for title in ("Skipped steps so far", "Length of a row", "Use of the device's peak (MFU)"):
        assert title not in found
    curriculum = [step(1, skipped_steps=1), step(2, stage=1, length=128)]
    found = by_title([make_run("b", curriculum)])
    assert {"Skipped steps so far", "Length of a row"} < found.keys()
    assert read_runs([Path(make_run("c", curriculum))])[0].stages == [(1, 64), (2, 128)]


def test_numbers_that_are_none_leave_gaps(make_run):
    folder = make_run("a", [step(1), step(2, loss=None, grad_norm=math.nan), step(3)])
    run = read_runs([folder])[0]
    assert run.training["grad_norm"].steps == run.training["loss"].steps == [1, 3]
    assert run.training["bits"].steps == [1, 2, 3]


def test_long_runs_have_a_panel_of_their_later_steps(make_run):
    long = make_run("long", [step(number) for number in range(1, LONG + 2)])
    short = make_run("short", [step(number) for number in range(1, 50)])
    later = by_title([long, short])["Loss, later steps"]
    assert later.first_step == (LONG + 1) / 2
    assert [line.run for line in later.lines] == [0]
    assert "Loss, later steps" not in by_title([short])


def test_smoothing_keeps_level_and_length_and_dampens_noise():
    steps = list(range(1000))
    flat = smoothed(Curve(steps, [2.0] * 1000))
    assert flat.steps == steps and flat.values == pytest.approx([2.0] * 1000)
    noisy = smoothed(Curve(steps, [5.0 + (-1) ** number for number in steps]))
    assert max(abs(value - 5) for value in noisy.values[20:]) < 0.1
    assert noisy.values[0] == 6.0  # nothing from later steps moves the start
    spike = Curve(steps, [1e4 if number == 500 else 1.0 for number in steps])
    assert max(smoothed(spike).values) > 100 > 10 > max(smoothed(spike, logarithms=True).values)
    assert smoothed(Curve(steps[:LONG], [1.0] * LONG)) is None


def test_the_mean_of_curves_takes_what_there_is():
    mean = mean_curve([Curve([1, 2], [1.0, 2.0]), Curve([2, 3], [4.0, 5.0])])
    assert (mean.steps, mean.values) == ([1, 2, 3], [1.0, 3.0, 5.0])


def test_names_and_colours_tell_runs_apart(make_run):
    places = [Path("/x/a/run"), Path("/x/b/run"), Path("/y/b/run"), Path("/x/other")]
    assert run_names(places) == ["a/run", "x/b/run", "y/b/run", "other"]
    assert run_names([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]
    for count in (1, 8, 9, 20):
        colours = run_colours([None] * count)
        assert len(set(colours)) == count and all(re.match("#[0-9a-f]{6}$", c) for c in colours)


@pytest.mark.parametrize("ending", ["png", "html"])
def test_runs_of_all_kinds_are_drawn(make_run, tmp_path, capsys, ending):
    sites = {f"layers.{number}.memory.state_norm": 10.0**number for number in range(8)}
    runs = [
        make_run("long & <b>bold", [step(n, **sites) for n in range(1, LONG + 50)]),
        make_run("going", [step(1), step(2)], end='{"step": 3, "lo'),
        make_run("other/going", [evaluation(0, **{"needle/64/on": 0.0, "needle/64/off": 0.0})]),
        make_run("begun"),
        make_run("one step", [step(1)]),
    ]
    output = tmp_path / f"curves.{ending}"
    output.write_text("of yesterday")
    assert main([*map(str, runs), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    data = output.read_bytes()
    if ending == "png":
        assert data.startswith(PNG) and len(data) > 50_000
        return
    page = data.decode()
    assert page.count("<img ") == page.count('prefers-color-scheme: dark)" srcset') >= 6
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", page) and "<script" not in page
    assert "long &amp; &lt;b&gt;bold" in page and "<b>bold" not in page
    legend = re.findall(r"background: (#[0-9a-f]{6})\"></span>([^<]+)</span>", page)
    assert [name for _, name in legend][1:] == [
        f"{tmp_path.name}/going", "other/going", "begun", "one step",
    ]  # fmt: skip
    assert len({shade for shade, _ in legend}) == 5


def test_a_real_run_is_drawn(make_config, tmp_path, monkeypatch):
    memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
    mixer = {"type": "sliding_attention", "window": 16, "num_heads": 2}
    layer = {"repeat": 2, "mixer": mixer, "memory": memory, "ffn": "swiglu"}
    config = make_config(model={"layers": [layer]}, steps=2, evaluation_rows=2)
    Trainer(config).run()
    titles = set(by_title([config.output_dir]))
    assert {"Loss", "What the memory saves", "Gradient norm before clipping", "Speed"} < titles
    monkeypatch.chdir(tmp_path)
    assert main([str(config.output_dir)]) == 0
    assert "Training of run" in (tmp_path / "curves.html").read_text()


def refused(words, capsys):
    assert main([*map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    return printed.err


def test_mistakes_end_with_one_line(make_run, tmp_path, capsys):
    good, output = make_run("good", [step(1)]), tmp_path / "curves.png"
    damaged = make_run("damaged", [step(1)], end='{"step": \n{"step": 2}\n')
    odd = make_run("odd", [{"step": "one", "loss": 1}])
    empty = make_run("empty")
    (tmp_path / "plain").mkdir()
    for words, message in (
        ([tmp_path / "none"], "none: there is no such run folder"),
        ([good / METRICS_FILE], "there is no such run folder"),
        ([tmp_path / "plain"], f"plain: it is no run folder, it has no {METRICS_FILE}"),
        ([good, damaged], f"damaged/{METRICS_FILE}: line 2 is no record of a run"),
        ([odd], f"odd/{METRICS_FILE}: line 1 is no record of a run"),
        ([empty], "no step is recorded yet"),
        ([good, tmp_path / "plain" / ".." / "good"], "the run is given twice"),
        ([], "no run folder is given; usage: "),
        ([good, "--outptu=x.png"], "unknown option --outptu=x.png; usage: "),
    ):
        assert message in refused([*words, f"--output={output}"], capsys), words
    for name, message in (
        ("curves.pdf", "curves.pdf must end with .png or .html"),
        ("curves", "curves must end with .png or .html"),
        ("nowhere/curves.png", "nowhere is missing"),
    ):
        assert message in refused([good, "--output", tmp_path / name], capsys), name
    assert "--output needs a value" in refused([good, "--output"], capsys)
    assert not output.exists()


def test_help_names_the_command(capsys):
    assert main(["--help"]) == 0
    assert "python -m memlm.training.plot RUN" in capsys.readouterr().out
