import json
import time

import pytest
import torch

from benchmarks import library, report


def busy(seconds):
    """A run that takes this much processor time."""

    def run(_):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return run


def test_times_and_their_ratio():
    times = library.time_interleaved({"a": busy(2e-3), "b": busy(6e-3)}, repeats=5)
    assert [len(samples) for samples in times.values()] == [5, 5]
    found = library.ratio(times["b"], times["a"])
    assert 2.4 < found.median < 3.6 and found.low <= found.median <= found.high


def test_runs_take_turns_after_a_warm_up():
    order = []
    runs = {
        name: lambda i, name=name: (order.append((name, i)), busy(3e-3)(i)) for name in ("a", "b")
    }
    library.time_interleaved(runs, repeats=3)
    assert [name for name, _ in order[:4]] == ["a", "a", "b", "b"]
    assert [name for name, _ in order[4:]] == ["a", "b"] * 3
    assert [number for name, number in order[4:] if name == "a"] == [2, 3, 4]


def test_short_runs_are_repeated_within_a_sample():
    calls = []
    times = library.time_interleaved({"short": lambda i: calls.append(i)}, repeats=3)
    assert len(calls) > 30 and len(times["short"]) == 3


def test_a_run_that_fails_leaves_its_reason_and_the_others():
    def fails(_):
        raise RuntimeError("no such\n  kernel")

    times = library.time_interleaved({"bad": fails, "good": busy(2e-3)}, repeats=2)
    assert times["bad"] == "RuntimeError: no such kernel"
    assert len(times["good"]) == 2


def test_a_run_that_fails_later_is_no_measurement_either():
    def fails_at(number):
        if number == 3:
            raise MemoryError("full")
        busy(3e-3)(number)

    times = library.time_interleaved({"bad": fails_at, "good": busy(2e-3)}, repeats=3)
    assert times["bad"] == "MemoryError: full" and len(times["good"]) == 3


def test_a_time_limit_leaves_the_fewest_rounds():
    times = library.time_interleaved({"a": busy(3e-3)}, repeats=50, limit=0)
    assert len(times["a"]) == library.FEWEST_ROUNDS


def test_ratio_by_round_and_its_quartiles():
    found = library.ratio([2.0, 6.0, 8.0, 5.0, 30.0], [1.0, 2.0, 2.0, 1.0, 3.0])
    assert found == library.Ratio(4.0, 3.0, 5.0)
    assert str(found) == "4.00 (3.00-5.00)"
    with pytest.raises(ValueError, match="2 rounds over 1"):
        library.ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 rounds over 0"):
        library.ratio([], [])


def test_one_thread_is_for_the_block_only():
    before = torch.get_num_threads()
    with library.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_ceilings_are_rates_of_the_work_done():
    # A matrix product of 256 rows takes longer than 1 us and less than 1 s on any processor.
    rate = library.matmul_ceiling("cpu", torch.float32, 256)
    assert 2 * 256**3 < rate < 2 * 256**3 * 1e6
    size = 1 << 20
    assert 2 * size < library.copy_ceiling("cpu", size) < 2 * size * 1e6


def test_the_cpu_has_no_peak_memory_and_one_set_of_inputs():
    assert library.peak_memory(busy(0), "cpu") is None
    assert library.input_sets(1, "cpu") == 1


def test_table_lines_up_and_shows_ratios():
    text = report.table(
        ("peer", "ms", "over a"),
        [["a", 1.23456, library.Ratio(1, 1, 1)], ["b|c", 12345.6, None]],
    )
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---- | ----: | ---------------- |"
    assert lines[2] == "| a    | 1.235 | 1.00 (1.00-1.00) |"
    assert lines[3] == "| b/c  | 12346 | -                |"
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        report.table(("a", "b"), [[1]])


def test_json_is_written_whole_with_dataclasses(tmp_path):
    path = tmp_path / "made" / "here.json"
    report.save_json({"ratio": library.Ratio(1.0, 0.5, 2.0), "where": tmp_path}, path)
    found = json.loads(path.read_text())
    assert found == {"ratio": {"median": 1.0, "low": 0.5, "high": 2.0}, "where": str(tmp_path)}
    assert [entry.name for entry in path.parent.iterdir()] == ["here.json"]
    circle = {}
    circle["circle"] = circle
    with pytest.raises(ValueError):
        report.save_json(circle, path)
    assert json.loads(path.read_text()) == found


def test_machine_names_what_numbers_depend_on():
    found = report.machine()
    assert found["cpu"] and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert set(report.machine_name()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
