import pytest

from memlm.errors import UserError
from memlm.evaluation.suite.config import Axes, load_suite

SHARED = """
title: T
question: Q
report: {kind: lengths}
base:
  train: {steps: 8, length: 16}
  evaluate: {}
tasks:
  easy:
  hard: {train: {steps: 9}}
memories:
  one: {model: {layers: [&mixer {type: attention, window: 4}]}}
  two: {model: {layers: [*mixer]}, widths: [4, 6], learning_rates: [1]}
widths: [8]
presets:
  small: {seeds: [3, 4], base: {train: {steps: 2}}, memories: {one: {widths: [5]}}}
"""


def test_preset_and_overrides_are_laid_over_the_file_in_this_order(suite_file):
    path = suite_file(SHARED)
    suite = load_suite(path)
    assert (suite.name, suite.preset, suite.seeds) == ("tiny", None, [0])
    assert suite.axes == {"one": Axes([8], None), "two": Axes([4, 6], [1.0])}
    assert suite.tasks == {"easy": {}, "hard": {"train": {"steps": 9}}}
    assert suite.memories["two"] == {"model": {"layers": [{"type": "attention", "window": 4}]}}

    words = ["--base.train.length", "32", "--memories.one.model.layers.0.window=7"]
    suite = load_suite(path, "small", [*words, "--seeds", "[5]"])
    assert suite.base["train"] == {"steps": 2, "length": 32}
    assert suite.seeds == [5]
    assert suite.axes["one"] == Axes([5], None)
    # What an alias of YAML shares is another memory's own.
    windows = [suite.memories[name]["model"]["layers"][0]["window"] for name in ("one", "two")]
    assert windows == [7, 4]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"memorys": {}}, ["unknown key 'memorys'", "'memories'"]),
        ({"presets": {"small": {"sedes": [1]}}}, ["presets.small", "'sedes'", "'seeds'"]),
        ({"title": None}, ["needs 'title'"]),
        ({"title": 3}, ["title", "a line of text", "3"]),
        ({"seeds": 0}, ["seeds", "a list of different integers >= 0", "0"]),
        ({"seeds": [1, 1]}, ["seeds", "different", "[1, 1]"]),
        ({"widths": [8.0]}, ["widths", "integers >= 1", "[8.0]"]),
        ({"learning_rates": [float("inf")]}, ["learning_rates", "numbers", "[inf]"]),
        ({"base__modle": {}}, ["base", "'modle'", "'model'"]),
        ({"base__train__output_dir": "x"}, ["base.train.output_dir", "--output"]),
        ({"tasks__parity__data": 3}, ["tasks.parity.data", "a mapping", "3"]),
        ({"memories__attention__width": [3]}, ["memories.attention", "'width'"]),
        ({"memories__attention__widths": []}, ["memories.attention: widths", "[]"]),
        (
            {"report": {"kind": "matrix", "groups": {"easy": ["party"]}}},
            ["report.groups.easy", "unknown task 'party'", "'parity'"],
        ),
    ],
)
def test_mistakes_are_told_in_a_line_with_file_and_key(suite_file, changes, parts):
    path = suite_file(**changes)
    with pytest.raises(UserError) as raised:
        load_suite(path, "small" if "presets" in changes else None)
    assert str(raised.value).startswith(path)
    for part in parts:
        assert part in str(raised.value)


def test_unknown_presets_files_and_overrides(suite_file, tmp_path, monkeypatch):
    path = suite_file(presets={"small": {}, "paper": {}})
    with pytest.raises(UserError, match=r"no preset 'smal'; did you mean 'small'\?"):
        load_suite(path, "smal")
    with pytest.raises(UserError, match="configs/suites/mqarr.yaml: no such config file"):
        load_suite("mqarr")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"mqar\.yaml: there is no folder configs/suites in /"):
        load_suite("mqar")
    with pytest.raises(UserError, match="unknown key 'seds'"):
        load_suite(path, None, ["--seds", "[0]"])
