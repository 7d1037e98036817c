import copy
import json
import struct
import zlib
from html.parser import HTMLParser

import pytest

from memlm.errors import UserError
from memlm.evaluation.ledger import Batch, Done
from memlm.evaluation.report import format_table, render_report
from memlm.evaluation.report.__main__ import main
from memlm.evaluation.report.failures import mark
from memlm.evaluation.report.groups import TITLES
from memlm.evaluation.report.html import inline, text
from memlm.evaluation.report.numbers import bytes_text, seconds_text
from memlm.evaluation.report.side_by_side import combine
from memlm.evaluation.ruler_average import ruler_averages
from memlm.evaluation.tasks import GROUPS, RULER
from memlm.evaluation.tasks.base import Record
from tests.evaluation.example_results import (
    LENGTHS,
    MEMORY,
    mqar,
    needle,
    recall_task,
    results,
    run,
    share,
    two_models,
)

VOID = {"meta", "img", "source", "br"}


def png() -> bytes:
    """A picture of one pixel."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


class Tags(HTMLParser):
    """Keeps the text, and fails where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.links, self.ids = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def render(found, pictures=()):
    images = {name: png() for name in pictures}
    return render_report(found, images, images)


@pytest.fixture(scope="module")
def page():
    return render(two_models(), ["needle_curves.png", "needle_depths_2.png", "cost.png"])


def ruler_run(name, lengths, values=None, conditions=("on", "off")):
    tasks = {task: recall_task(task, lengths, True, list(conditions)) for task in RULER}
    for task in tasks.values():
        for length, value in zip(lengths, values or [], strict=False):
            task["scores"][length]["on"] = {"value": value, "low": 0.0, "high": 1.0, "count": 9}
    return run(name, tasks, ruler=ruler_averages(tasks))


def test_table_of_one_model():
    found = results(run("m", {"needle": needle(["1024", "1000000"], True, ["on", "off"])}))
    head, line, row, other, brackets = format_table(found).splitlines()
    assert head.split() == ["task", "setting", "on", "off"]
    assert set(line) == {"-"} and len(line) == len(row)
    assert row == "needle, recall (%)  1k tokens       100.0 [91.2, 100.0]  2.5 [0.4, 12.9]"
    assert other.startswith("needle, recall (%)  1000000 tokens  ")
    assert brackets.startswith("Brackets: 95 % intervals")


def test_table_of_two_models():
    lines = format_table(two_models()).splitlines()
    assert lines[0].split()[:4] == ["model", "task", "setting", "on"]
    rows = [line.split("  ") for line in lines[2:]]
    assert sum(row[0] == 'llama "tiny"' for row in rows) == 3 + 3 + 4
    assert sum(row[0] == "gated <delta> & co" for row in rows) == 4 + 3 + 4
    alone = next(line for line in lines if line.startswith("llama") and "4k tokens" in line)
    assert alone.count("–") == 3  # off, reset, swapped
    loss = next(line for line in lines if "all tokens" in line)
    assert "1.950 [1.850, 2.050]" in loss and "+0.305 [+0.295, +0.315]" in loss
    assert "1.800 [?, ?]" in "\n".join(lines)
    assert 'llama "tiny": The model has no memory' in lines[-1]


def test_table_of_ruler():
    table = format_table(results(ruler_run("m", ["4096", "8192"], [0.9, 0.5])))
    rows = [line for line in table.splitlines() if line.startswith("RULER, mean of 13 tasks (%)")]
    assert [row.split()[-2:] for row in rows] == [
        ["90.0", "2.5"],
        ["50.0", "2.5"],
        ["70.0", "2.5"],
        ["63.3", "2.5"],
        ["76.7", "2.5"],
    ]
    assert "RULER: effective length 4k tokens" in table


def test_page_is_whole_and_alone(page):
    tags = Tags(page)
    assert {link.removeprefix("#") for link in tags.links} <= set(tags.ids)
    assert len(set(tags.ids)) == len(tags.ids)
    for outside in ("http:", "https:", "<script", "<link", "url(", "@import", "<iframe"):
        assert outside not in page
    assert page.count("data:image/png;base64,") == 6  # three pictures, light and dark
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    page.encode("utf-8")  # no half of a surrogate pair is left


def test_page_escapes_everything(page):
    assert "<delta>" not in page and "gated &lt;delta&gt; &amp; co" in page
    assert "llama &quot;tiny&quot;" in page
    assert "python eval.py --model &#x27;a &lt;b&gt;&#x27;" in page
    assert "<i>" not in page and "1\\x07&lt;i&gt;2\\n\\ud800" in page
    assert "books/a &amp; b.txt" in page
    assert "find it &amp; repeat it" in page


def test_page_says_what_was_measured(page):
    said = " ".join(" ".join(Tags(page).text).split())
    for part in (
        "435,596",  # parameters
        "260 tokens",
        "everything",
        "8.0 MiB",  # keys and values of the transformer
        "68.4 KiB",
        "Recalled by the memory",
        "another value stands in the same place",
        "nothing is hidden",
        "on − swapped",
        "swapped − on",
        "64k",
        "2.250 [2.150, 2.350]",
        "1.800 [?, ?]",
        "at least 260 tokens before the question; a guess is right in 0.001 %.",
        "perplexity per token: on 6.50",
        "The model has no memory",
        "memlm 0.1.0, torch 2.13.0",
        "0123456789abcdef",
        "300 MiB",
        "6 min",
    ):
        assert part in said, part


def test_failures_show_the_needle(page):
    assert "# The key is <mark>90210</mark>.\n\\x1b[0m&lt;/pre&gt;</pre>" in page
    assert "x0 = 1902109" in page  # not a whole word
    assert page.count("<summary>2 more</summary>") == 2
    assert page.count("<h3>Failures</h3>") == 1  # one of MQAR has nothing to be seen


def test_models_are_compared(page):
    said = " ".join(" ".join(Tags(page).text).split())
    assert 'gated <delta> & co − llama "tiny"' in said
    assert "needle 1k +5.0 [+1.0, +9.0] 40 4 2 yes" in said
    assert "needle 4k +5.0 [+1.0, +9.0] 40 4 2 no" in said
    assert "perplexity 256-511 -0.250 [?, ?] 1 0 1 yes" in said
    assert page.count("<b>+5.0</b>") == 2 and "<b>-0.250</b>" not in page


def test_groups_are_one_section():
    babilong = {
        task: recall_task(task, ["0", "4096"], True, ["on"]) for task in GROUPS["babilong"][:3]
    }
    first = ruler_run("first", LENGTHS[:2])
    first["tasks"] |= babilong
    second = ruler_run("second", LENGTHS[:1])
    del second["tasks"]["vt"]
    second["ruler"] = None
    page = render(results(first, second))
    tags = Tags(page)
    assert tags.ids == ["ruler", "babilong", "repeat"]
    said = " ".join(" ".join(tags.text).split())
    assert "mean of 13 tasks 100.0 87.5" in said and "mean of 12 tasks 100.0" in said
    assert "effective length first memory on" in said
    assert "task 0 4k babilong_qa1" in said
    assert page.count("<details>") > 13


def test_no_memory_and_no_cost():
    bare = needle(["1024"], True, ["on"]) | {"cost": {}, "failures": [], "depths": {}}
    found = results(run("m", {"needle": bare}), command=None, hashes={})
    found["runs"][0]["model"]["source"] = None
    said = " ".join(Tags(render(found)).text)
    assert "No model was measured with its memory taken away" in said
    assert "1 task with 1 model, in 1 condition" in said
    assert "made in memory" in said and "None" not in said


def test_ruler_averages_are_the_published_ones():
    # GPT-4's means of 4K to 128K and their averages, Hsieh et al. (2024), table 3.
    lengths = [str(4096 << power) for power in range(6)]
    found = ruler_run("m", lengths, [0.966, 0.963, 0.952, 0.932, 0.870, 0.812])["ruler"]["on"]
    assert round(100 * found["average"], 1) == 91.6
    assert round(100 * found["increasing"], 1) == 89.0
    assert round(100 * found["decreasing"], 1) == 94.1
    assert found["effective_length"] == 65536
    assert list(found["means"]) == lengths


def test_ruler_averages_need_all_tasks():
    tasks = ruler_run("m", LENGTHS[:2], conditions=MEMORY)["tasks"]
    tasks["vt"]["scores"] = {"1024": {"on": share(0.0), "off": share(0.0)}}
    found = ruler_averages(tasks)
    assert list(found) == ["on", "off"] and list(found["on"]["means"]) == ["1024"]
    assert found["on"]["average"] == pytest.approx(12 / 13)
    assert found["off"]["effective_length"] is None
    tasks["vt"]["scores"] = {}
    assert ruler_averages(tasks) is None
    del tasks["vt"]
    assert ruler_averages(tasks) is None


def test_control_characters_are_seen():
    assert text("a\x00\n\t\u202eb\x85\ud800") == "a\\x00\n\t\\u202eb\\x85\\ud800"
    assert inline("a\n<\t") == "a\\n&lt;\\t"


def test_marks_are_whole_and_the_longest():
    assert mark("12 123 <12>", ["12", "123", " "]) == (
        "<mark>12</mark> <mark>123</mark> &lt;<mark>12</mark>&gt;"
    )
    assert mark("Kitchen & a.b axb", ["kitchen", "a.b"]) == (
        "<mark>Kitchen</mark> &amp; <mark>a.b</mark> axb"
    )
    assert mark("<x>", []) == "&lt;x&gt;"


def test_human_units():
    sizes = [bytes_text(size) for size in (0, 1023, 1024, 153600, 3 << 29, None)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "150 KiB", "1.5 GiB", "–"]
    spans = [seconds_text(seconds) for seconds in (0.04, 61, 600, 12000)]
    assert spans == ["0.0 s", "61 s", "10 min", "3 h 20 min"]


def finished(folder, found, scores=None):
    """An evaluation on disk; `scores` of trials of the first run's needle at 1024 as records."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    if scores is not None:
        answers = [{"prediction": "", "references": ["7"], "score": 0.0}]
        records = [
            Record("1024", trial, "on", score, answers, prompt=f"p{trial}")
            for trial, score in enumerate(scores)
        ]
        done = Done(Batch(0, "needle", "1024", 0, len(records)), records, {})
        (folder / "records").mkdir()
        (folder / "records" / "0.jsonl").write_text(done.to_json() + '\n{"batch": unfini')
    return folder


def small(name="m", **more):
    return results(run(name, {"needle": needle(["1024"], True, ["on"])}), **more)


def test_evaluations_side_by_side(tmp_path):
    first = finished(tmp_path / "first", small(command="python a"), [1.0, 1.0, 0.0, 1.0])
    second = finished(tmp_path / "second", small(command="python b"), [1.0, 0.0, 0.0, 0.0])
    other = small("third", versions={"memlm": "0.2.0"})
    third = finished(tmp_path / "third", other)
    found = combine([first, second, third])
    names = [run["model"]["name"] for run in found["runs"]]
    assert names == ["m (first)", "m (second)", "third"]
    (comparison,) = found["comparisons"]
    assert comparison["first"] == "m (first)" and comparison["first_only"] == 2
    assert comparison["paired"] and comparison["difference"]["value"] == 0.5
    assert found["command"].splitlines()[:2] == ["python a", "python b"]
    assert found["versions"] == {"memlm": "0.1.0 or 0.2.0", "torch": "2.13.0 or ?"}
    Tags(render(found))


def test_names_stay_different(tmp_path):
    folders = [finished(tmp_path / part / "out", small()) for part in ("a", "b")]
    names = [run["model"]["name"] for run in combine(folders)["runs"]]
    assert names == ["m (out)", "m (out) 2"]


def test_comparisons_without_records_are_kept(tmp_path):
    both = two_models()
    folders = [finished(tmp_path / name, copy.deepcopy(both)) for name in ("x", "y")]
    found = combine(folders)["comparisons"]
    assert len(found) == 2 * len(both["comparisons"])
    assert found[-1]["first"] == "gated <delta> & co (y)"


def test_report_of_several_folders(tmp_path, capsys):
    first = finished(tmp_path / "first", small("a"), [1.0, 0.0])
    second = finished(tmp_path / "second", results(run("b", {"mqar": mqar(["on"])})))
    out = tmp_path / "new" / "out"
    assert main([str(first), str(second), "--output", str(out)]) == 0
    assert {path.name for path in out.iterdir()} > {"results.json", "report.html", "cost.png"}
    written = json.loads((out / "results.json").read_text())
    assert [run["model"]["name"] for run in written["runs"]] == ["a", "b"]
    assert "mqar, recall (%)" in capsys.readouterr().out
    # And once more from what was just written.
    assert combine([out])["runs"] == written["runs"]


def broken(change):
    found = small()
    change(found)
    return json.dumps(found)


BAD = {
    "no folder": ([], "no folder of a finished evaluation"),
    "no output": (["{good}"], "--output is needed"),
    "no value": (["{good}", "--output"], "--output needs a value"),
    "unknown option": (["{good}", "--out", "x"], "unknown option --out"),
    "missing": (["{tmp}/none", "--output", "{tmp}/o"], "none: no readable results.json"),
    "twice": (["{good}", "{good}/.", "--output", "{tmp}/o"], "given twice"),
    "not empty": (["{good}", "--output={good}"], "is not empty"),
    "a file": (["{good}", "--output", "{good}/results.json/x"], "cannot be written"),
}
BAD_RESULTS = {
    "no JSON": ("{", "no JSON"),
    "a list": ("[]", "no results of an evaluation of this version"),
    "old": ('{"model": {}, "tasks": {}}', r"\(runs, comparisons, command"),
    "no runs": (broken(lambda found: found.update(runs=[])), "holds no scores"),
    "a run without scores": (broken(lambda found: found["runs"][0].update(tasks={})), "no scores"),
    "a run without a name": (broken(lambda found: found["runs"][0].update(model={})), "'name'"),
    "a run without notes": (broken(lambda found: found["runs"][0].pop("notes")), "at 'notes'"),
    "a task without scores": (
        broken(lambda found: found["runs"][0]["tasks"]["needle"].pop("scores")),
        "damaged at 'scores'",
    ),
    "a name that is a path": (
        broken(lambda found: found["runs"][0].update(tasks={"../x": {}})),
        "damaged at ../x",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, tmp_path, capsys):
    good = finished(tmp_path / "good", small())
    words, message = BAD[name]
    assert main([word.format(good=good, tmp=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in good.iterdir()} == {"results.json"}
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_damaged_results(name, tmp_path):
    (tmp_path / "results.json").write_text(BAD_RESULTS[name][0])
    with pytest.raises(UserError, match=BAD_RESULTS[name][1]) as error:
        combine([tmp_path])
    assert str(tmp_path) in str(error.value)


def test_damaged_records_and_other_confidence(tmp_path):
    folder = finished(tmp_path / "first", small(), [1.0])
    other = finished(tmp_path / "second", small(confidence=0.9))
    with pytest.raises(UserError, match="different confidence"):
        combine([folder, other])
    (folder / "records" / "0.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"0\.jsonl:1: no record of this evaluation"):
        combine([folder])


def test_help_says_how(capsys):
    assert main(["--help"]) == 0
    assert "DIR [DIR ...] --output NEWDIR" in capsys.readouterr().out


def test_every_group_has_a_title():
    assert set(TITLES) == set(GROUPS)
