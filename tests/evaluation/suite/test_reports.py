import warnings

import pytest

from memlm.errors import UserError
from tests.evaluation.suite.example_suite import FAILURE, cell, suite


@pytest.fixture(autouse=True)
def plain_reports():
    """The reports themselves."""


@pytest.fixture
def reports():
    from memlm.evaluation.suite import reports

    return reports


def rows(table):
    """The cells of every row of the first table, by the first columns joined."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[text.strip() for text in line.strip("|").split(" | ")] for line in lines]


def drawn(reports, results):
    """{panel: {memory: (places, values)}} of the lines of a picture, and its figure."""
    module, options = reports._parse(results["report"])
    with reports.paper_style():
        figure = module.draw(results, options)
    panels = []
    for axis in figure.axes:
        found = {}
        for container in axis.containers:
            line = container.lines[0]
            found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
        panels.append(found)
    return panels, figure


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def picture(reports, results):
    """Draw it; warnings of the library are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return reports.draw_plot(results)


def frontier_cells():
    state = {"4": 1024, "8": 2048}
    return [
        cell("attention", 16, {"4": 1.0, "8": 0.5}, state=state),
        cell("attention", 16, {"4": 0.8, "8": 0.4}, state=state, seed=1),
        cell("delta", 16, {"4": 0.25, "8": 0.75}),
        cell("delta", 16, {}, seed=1, error=FAILURE),
        cell("delta", 32, {}, error=FAILURE),
        cell("delta", 32, {}, seed=1, error=FAILURE),
    ]


def test_table_of_a_frontier(reports):
    table = reports.make_table(suite(frontier_cells(), kind="frontier"))
    assert rows(table) == [
        ["memory", "width", "state of a row", "parameters", "learning rate", "parity, 4 (%)",
         "parity, 8 (%)"],
        ["attention", "16", "1.0 KiB to 2.0 KiB", "1,600", "0.003", "**90.0** [80.0, 100.0]",
         "45.0 [40.0, 50.0]"],
        ["delta", "16", "1.0 KiB", "1,600", "0.003", "25.0 †", "**75.0** †"],
        ["delta", "32", "–", "3,200", "0.003", "failed", "failed"],
    ]  # fmt: skip
    assert f"- †: delta, width 16: 1 of 2 seeds failed ({FAILURE})" in table
    assert f"- failed: delta, width 32: 2 of 2 seeds failed ({FAILURE})" in table


def test_frontier_of_the_mean_and_the_last_setting(reports):
    report = {"kind": "frontier", "setting": ["last", "mean"]}
    table = rows(reports.make_table(suite(frontier_cells(), **report)))
    # Seed 0: (1 + 0.5) / 2; seed 1: (0.8 + 0.4) / 2.
    assert table[1][-2:] == ["45.0 [40.0, 50.0]", "**67.5** [60.0, 75.0]"]
    assert table[0][-2:] == ["parity, 8 (%)", "parity, mean (%)"]


def test_lines_of_a_frontier(reports):
    panels, figure = drawn(reports, suite(frontier_cells(), kind="frontier", chance=0.1))
    assert panels == [
        {"attention": ([1024], [90.0]), "delta": ([1024], [25.0])},
        {"attention": ([2048], [45.0]), "delta": ([1024], [75.0])},
    ]
    assert legend_of(figure) == ["attention", "delta (32 failed)", "chance"]
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    assert [list(map(float, point)) for point in bars[0]] == [[1024, 80], [1024, 100]]


def test_losses_are_better_when_lower(reports):
    cells = [cell("attention", 8, {"4": 2.5}), cell("delta", 8, {"4": 1.25})]
    table = rows(reports.make_table(suite(cells, kind="frontier", loss=True)))
    assert [row[-1] for row in table] == ["parity, 4", "2.500", "**1.250**"]


def length_cells():
    return [
        cell("attention", 16, {"16": 0.0, "32": 0.0}),
        cell("attention", 32, {"16": 1.0, "32": 0.5}),
        cell("delta", 32, {"16": 1.0, "32": None}),
        cell("attention", 32, {"16": 0.5, "32": 0.25}, task="induction"),
        cell("min_gru", 32, {}, error=FAILURE),
        cell("min_gru", 32, {"16": 0.75, "32": 0.5}, task="induction"),
    ]


def test_table_by_length_has_the_largest_width(reports):
    results = suite(length_cells(), kind="lengths")
    table = reports.make_table(results)
    first, second = table.split("**induction**")
    assert [[row[0], row[1], *row[4:]] for row in rows(first)] == [
        ["memory", "width", "16 (%)", "32 (%)"],
        ["attention", "32", "100.0", "50.0"],
        ["delta", "32", "100.0", "–"],
        ["min_gru", "32", "failed", "failed"],
    ]
    assert [[row[0], *row[4:]] for row in rows(second)][1:] == [
        ["attention", "50.0", "25.0"],
        ["delta", "–", "–"],
        ["min_gru", "**75.0**", "**50.0**"],
    ]
    assert rows(reports.make_table(suite(length_cells(), kind="lengths", width=16)))[1][4] == "0.0"


def test_lines_by_length(reports):
    results = suite(length_cells(), kind="lengths", trained=20)
    (parity, induction), figure = drawn(reports, results)
    assert list(parity) == ["attention", "delta"]
    assert parity["attention"][1] == [100.0, 50.0]
    assert parity["delta"][1][0] == 100.0
    assert parity["delta"][1][1] != parity["delta"][1][1]  # not a number: a gap
    assert induction["min_gru"][1] == [75.0, 50.0]
    first = figure.axes[0]
    assert (first.get_xlabel(), first.get_ylabel()) == ("length (tokens)", "accuracy (%)")
    # Moved to both sides of the length by the same factor, the one between them not at all.
    assert parity["attention"][0] == pytest.approx([16 * 2**-0.2, 32 * 2**-0.2])
    assert parity["delta"][0] == [16, 32]
    assert legend_of(figure) == [
        "attention",
        "delta (missing in 1 of 2)",
        "min_gru (failed in 1 of 2)",
        "trained length",
    ]


def test_matrix_of_what_is_beyond_the_trained_length(reports):
    cells = [
        cell("attention", 8, {"16": 0.0, "32": 0.9, "64": 1.0}, task="sort"),
        cell("attention", 8, {"16": 1.0, "32": 0.5, "64": 0.25}),
        cell("delta", 8, {}, error=FAILURE),
    ]
    report = {"kind": "matrix", "beyond": 16, "groups": {"Regular": ["parity"], "Other": ["sort"]}}
    results = suite(cells, **report)
    assert rows(reports.make_table(results)) == [
        ["group", "task", "attention", "delta"],
        ["Regular", "parity", "37.5", "failed"],
        ["Other", "sort", "**95.0**", "–"],
        ["", "solved (at least 90 %)", "1", "0"],
    ]
    _, figure = drawn(reports, results)
    grid = figure.axes[0].images[0].get_array()
    assert grid[0].tolist() == [37.5, 95.0]
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "38", "95", "failed", "–", "Regular", "Other",
    ]  # fmt: skip
    assert len(figure.axes[0].patches) == 1  # the frame of what is solved


def facts(memory, width, bits, seed=0):
    measures = {"facts": {"all": {"on": {"bits": bits, "facts": 500}}}}
    return cell(memory, width, {"all": 0.5}, task="facts", seed=seed, measures=measures)


def test_capacity(reports):
    cells = [facts("dense", 10, 1000.0), facts("dense", 10, 3000.0, 1), facts("moe", 10, 500.0)]
    cells.append(cell("moe", 20, {}, task="facts", error=FAILURE))
    results = suite(cells, kind="capacity")
    # 1,000 parameters and 2,000 operations.
    assert [row[3:] for row in rows(reports.make_table(results))[1:]] == [
        ["1,000", "2,000", "**2,000** [1,000, 3,000]", "**2.000** [1.000, 3.000]",
         "**1.000** [0.500, 1.500]"],
        ["1,000", "2,000", "500", "0.500", "0.250"],
        ["2,000", "4,000", "failed", "failed", "failed"],
    ]  # fmt: skip
    panels, figure = drawn(reports, results)
    assert panels[0]["dense"] == ([1000], [2000.0])
    assert panels[1]["dense"] == ([2000], [2000.0])
    assert panels[0]["moe"][0] == [1000, 2000]
    assert legend_of(figure) == ["dense", "moe (20 failed)"]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["frontier", "lengths", "matrix", "capacity"])
def test_pictures_are_drawn_without_warnings(reports, kind, value):
    cells = [
        cell(
            f"memory {index}",
            8,
            {"16": value},
            measures={"parity": {"16": {"on": {"bits": value}}}},
        )
        for index in range(14)
    ]
    assert picture(reports, suite(cells, kind=kind)).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("kind", ["frontier", "lengths", "matrix", "capacity"])
def test_suites_of_which_every_cell_failed(reports, kind):
    results = suite([cell("attention", 8, {}, error=FAILURE)], kind=kind)
    assert "| failed |" in reports.make_table(results)
    assert picture(reports, results).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["frontier", "lengths", "matrix", "capacity"])
def test_pretrained_models_have_no_width_and_no_size_until_they_ran(reports, kind):
    sizes = {"parameters": None, "flops_per_token": None}
    cells = [
        cell("attention", 8, {"4": 1.0}),
        cell("delta", 8, {}, error=FAILURE, **sizes),
    ]
    results = suite([one | {"width": None} for one in cells], kind=kind)
    assert "failed" in reports.make_table(results)
    assert picture(reports, results).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["frontier", "lengths", "capacity"])
def test_memories_without_a_line_are_in_the_legend(reports, kind):
    _, figure = drawn(
        reports, suite([cell("attention", 8, {"4": 1.0})], kind=kind, condition="off")
    )
    said = "missing" if kind == "lengths" else "8 missing"
    assert legend_of(figure) == [f"attention ({said})"]


def test_cells_that_are_not_finished_are_named(reports):
    results = suite([cell("attention", 8, {"4": 1.0})], kind="lengths")
    results["missing"] = ["parity-delta-8"]
    assert reports.make_table(results).endswith("- not finished: parity-delta-8")


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, "unknown kind None"),
        ({"kind": "frontiers"}, "did you mean 'frontier'"),
        ({"kind": "lengths", "train": 40}, "did you mean 'trained'"),
        ({"kind": "lengths", "trained": "long"}, "trained"),
        ({"kind": "frontier", "setting": ["1", "2", "3", "4", "5"]}, "give 1 to 4"),
        ({"kind": "matrix", "groups": {"Regular": "parity"}}, "expected a list of tasks"),
        ({"kind": "matrix", "groups": {"a": ["x"], "b": ["x"]}}, "in two groups"),
        ({"kind": "matrix", "solved": 90}, "must be in"),
        ({"kind": "frontier", "setting": [[4]]}, "setting"),
        ({"kind": "frontier", "chance": 5}, "must be a score"),
        ({"kind": "lengths", "width": 0}, "must be at least 1"),
        ({"kind": "capacity", "condition": "offf"}, "did you mean 'off'"),
        ({"kind": "capacity", "setting": "mean"}, "have no mean"),
    ],
)
def test_reports_that_are_refused(reports, report, said):
    with pytest.raises(UserError, match=said) as caught:
        reports.check_report(report)
    assert "\n" not in str(caught.value)


def test_what_was_not_evaluated_is_refused(reports):
    cells = [cell("attention", 8, {"4": 1.0})]
    with pytest.raises(UserError, match="'9' was not evaluated"):
        reports.make_table(suite(cells, kind="frontier", setting=9))
    with pytest.raises(UserError, match="'mqar' was not evaluated"):
        reports.make_table(suite(cells, kind="lengths", task="mqar"))
