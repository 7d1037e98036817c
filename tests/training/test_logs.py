import json
import math
from typing import ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from memlm.errors import UserError
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, RunLog, bits, check_trackers, read_metrics
from memlm.training.plot import plot_metrics


def step(number, **extra):
    return {
        "step": number,
        "loss": 1.0,
        "text_bits": 2.0 / number,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 12_345.0,
        "stage": 0,
        "length": 64,
        "window": None,
        "mfu": None,
        "memory_bytes": 1_234_567_890,
        "seconds_left": 3723.0,
        **extra,
    }


def test_bits_are_means_over_the_targets_there_are():
    result = bits([4 * math.log(2), 0.0], [2, 0])
    assert result == {"bits": pytest.approx(2.0), "text_bits": pytest.approx(2.0)}
    result = bits([4 * math.log(2), 4 * math.log(2)], [2, 1])
    assert result["bits"] == pytest.approx(8 / 3)
    assert result["answer_bits"] == pytest.approx(4.0)


def test_line_is_readable(tmp_path, capsys):
    log = RunLog(tmp_path, steps=200)
    log.step_line(step(20, answer_bits=0.5, stage=1, window=16, mfu=0.4127), stages=2)
    line = capsys.readouterr().out
    for part in ("step  20/200 ( 10 %)", "text 0.100", "answer 0.500 bits", "stage 2/2", "64:16"):
        assert part in line
    for part in ("12.3k tokens/s", "MFU 41.3 %", "1.23 GB", "left 1:02:03"):
        assert part in line
    bits = {"source/text/bits": 2.5, "source/text.2/bits": 0.25}
    log.step_line(step(20, **bits, seconds_left=None), stages=1)
    line = capsys.readouterr().out
    assert "text 0.100 bits (text 2.500, text.2 0.250)  lr" in line
    assert "MFU n/a (cpu)" in line and "left ?" in line
    RunLog(tmp_path, steps=200_000).step_line(step(20_000, length=4096, window=1024), stages=1)
    assert len(capsys.readouterr().out) <= 161
    log.step_line(step(20), stages=1, device="NVIDIA Unheard 9")
    assert "MFU n/a (NVIDIA Unheard 9)" in capsys.readouterr().out


def test_a_log_that_is_no_terminal_has_plain_lines(tmp_path, capfd):
    log = RunLog(tmp_path, steps=3)
    for number in (1, 2, 3):
        log.tick(100.0)
        log.step_line(step(number), stages=1)
    log.close()
    out, err = capfd.readouterr()
    assert out.count("\n") == 3 and "\r" not in out and err == ""


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    log = RunLog(tmp_path, steps=3)
    log.record({"step": 1, "a": math.nan, "b": -math.inf, "c": 1.5, "window": None})
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line) == {"step": 1, "a": None, "b": None, "c": 1.5, "window": None}
    assert "NaN" not in line and "Infinity" not in line


def test_resumed_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text("".join(json.dumps(step(number)) + "\n" for number in (1, 2, 3)))
    log = RunLog(tmp_path, steps=5, step=2)
    log.record(step(3, loss=7.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]


def test_other_processes_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, steps=5, silent=True)
    log.record(step(1))
    log.line("text")
    log.tick(1.0)
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("count", [0, 1, 30])
def test_plot_of_any_number_of_records(tmp_path, count):
    records = [step(n, stage=n // 10, length=64 * (1 + n // 10)) for n in range(1, count + 1)]
    records.append({"step": count, "evaluation": True, "bits": 2.0, "text_bits": 2.0})
    plot_metrics(records, tmp_path / "training.png", r"A run in a folder $named$ $\so$")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


class Recording(GeneralTracker):
    """Keeps what it is given."""

    name = "trackio"
    requires_logging_directory = False
    logged: ClassVar[list] = []
    fails: ClassVar[bool] = False

    def __init__(self, run_name, **kwargs):
        super().__init__()

    @property
    def tracker(self):
        return None

    def start(self):
        if self.fails:
            raise RuntimeError("No API key configured.\nUse `login`")

    def store_init_configuration(self, values):
        self.logged.append(values)

    def log(self, values, step=None, **kwargs):
        self.logged.append({"step": step} | values)


@pytest.fixture
def trackio(monkeypatch):
    """A tracker that is there."""
    monkeypatch.setattr(Recording, "logged", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recording)
    kinds = [LoggerType.TRACKIO]
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: kinds)
    monkeypatch.setattr(tracking, "_available_trackers", kinds)
    return Recording


def test_trackers_get_the_numbers_of_every_record(make_config, trackio):
    config = make_config(steps=2, trackers=["trackio"], evaluation_rows=2)
    Trainer(config).run()
    start, before, *steps, after = trackio.logged
    assert start["train.steps"] == 2
    assert before["step"] == 0 and after["step"] == 2 and "held_out/bits" in after
    records = [r for r in read_metrics(config.output_dir / METRICS_FILE) if "loss" in r]
    known = [{k: v for k, v in record.items() if v is not None} for record in records]
    assert steps == known and "mfu" not in steps[0] and steps[1]["step"] == 2


def test_a_tracker_that_does_not_start_is_one_line(make_config, trackio, monkeypatch):
    monkeypatch.setattr(trackio, "fails", True)
    config = make_config(trackers=["trackio"])
    with pytest.raises(UserError) as error:
        Trainer(config)
    message = "train.trackers: 'trackio' did not start (No API key configured.)"
    assert str(error.value) == message
    assert not config.output_dir.exists()


@pytest.mark.parametrize("name", sorted(tracking.LOGGER_TYPE_TO_CLASS))
def test_a_tracker_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=f"'{name}' is not installed: pip install {name}$"):
        check_trackers([name])


def test_a_tracker_that_nobody_knows():
    with pytest.raises(UserError, match="unknown tracker 'wandbb'.*wandb"):
        check_trackers(["wandbb"])
