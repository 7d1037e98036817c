"""SIGTERM and SIGINT: the step is finished and saved, the exit code is 0."""

import os
import signal
import subprocess
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from memlm.config import save_config
from memlm.training import Trainer, interrupt
from memlm.training.interrupt import Interruption
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.main import main
from memlm.training.manifest import check_manifest
from memlm.training.retention import complete_checkpoints
from tests.training.test_processes import LAUNCH, ROOT
from tests.training.test_trainer import losses


@pytest.mark.parametrize("number", interrupt.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_checkpoint_and_nothing_is_lost(
    make_config, tmp_path, monkeypatch, capfd, number
):
    options = {"steps": 6, "evaluation_rows": 4, "evaluate_every": 3, "save_every": 100}
    whole, parts = make_config("whole", **options), make_config("parts", **options)
    Trainer(whole).run()
    save_config(parts, tmp_path / "parts.yaml")
    words = ["--config", str(tmp_path / "parts.yaml"), "--resume", "auto"]
    one_step = Trainer._one_step

    def interrupted(self):
        if self.step == 2:
            signal.raise_signal(number)
        return one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    capfd.readouterr()
    handlers = [signal.getsignal(one) for one in interrupt.SIGNALS]
    assert main([*words, "--evaluate={tasks: [needle]}"]) == 0
    assert [signal.getsignal(one) for one in interrupt.SIGNALS] == handlers
    printed = capfd.readouterr()
    assert f"{number.name}: finishing the step and saving" in printed.err
    (place,) = complete_checkpoints(parts.output_dir)
    assert f"stopped by a signal, all of it is in {place}; go on with --resume" in printed.out
    assert place.name == "step_000003"
    assert not list(parts.output_dir.glob("*.safetensors"))
    assert not (parts.output_dir / "evaluation").exists()

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    assert main(words) == 0
    assert losses(parts) == losses(whole)
    bits = [
        [(r["step"], r["bits"]) for r in read_metrics(c.output_dir / METRICS_FILE)]
        for c in (whole, parts)
    ]
    assert bits[0] == bits[1]  # the evaluation after step 3 was made up for
    weights = [load_file(c.output_dir / "model.safetensors") for c in (whole, parts)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_same_request_may_come_twice_and_a_later_one_ends_at_once(monkeypatch, capfd):
    killed, now = [], [100.0]
    monkeypatch.setattr(interrupt.os, "kill", lambda process, number: killed.append(number))
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with Interruption() as interruption:
        assert interruption.name is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a launcher's word for the same Ctrl-C
        signal.raise_signal(signal.SIGTERM)
        assert interruption.name == "SIGINT"
        assert not killed
        now[0] += 3
        signal.raise_signal(signal.SIGTERM)
        assert killed == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capfd.readouterr().err.count("\n") == 1


def test_outside_the_main_thread_signals_are_left_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with Interruption():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(make_config, tmp_path):
    config = make_config(steps=100_000)
    save_config(config, tmp_path / "run.yaml")
    started = subprocess.Popen(
        [
            *(*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
            *(str(ROOT / "train.py"), "--config", str(tmp_path / "run.yaml")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    try:
        metrics, deadline = config.output_dir / METRICS_FILE, time.monotonic() + 90
        while not metrics.exists() or len(read_metrics(metrics)) < 3:
            assert started.poll() is None and time.monotonic() < deadline, started.stdout.read()
            time.sleep(0.2)
        ranks = [
            child
            for child in psutil.Process(started.pid).children(recursive=True)
            if child.environ().get("RANK") == "1"
        ]
        ranks[0].send_signal(signal.SIGTERM)
        printed, _ = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 0, printed
    (place,) = complete_checkpoints(config.output_dir)
    check_manifest(place)
    assert f"all of it is in {place}" in printed
