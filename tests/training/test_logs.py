import json
import math

import pytest

from memlm.training.logs import METRICS_FILE, RunLog, bits, read_metrics
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
    log.step_line(step(20, answer_bits=0.5, stage=1, window=16), stages=2)
    log.close()
    line = capsys.readouterr().out
    for part in ("step  20/200 ( 10 %)", "text 0.100", "answer 0.500 bits", "stage 2/2", "64:16"):
        assert part in line
    assert "12.3k tokens/s" in line and "left " in line


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
    plot_metrics(records, tmp_path / "training.png", "A run")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
