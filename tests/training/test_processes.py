import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm.config import Stage, save_config
from memlm.errors import UserError
from memlm.training import Trainer
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.setup import check_processes
from tests.training.launching import run_two

ROOT = Path(__file__).parent.parent.parent
MEMORY = [
    {
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": "swiglu",
    }
]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(options, config, path, **environment):
    save_config(config, path)
    clean = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    return subprocess.run(
        [*LAUNCH, *options, str(ROOT / "train.py"), "--config", str(path)],
        timeout=300,
        capture_output=True,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )


def launch_sharded(config, path, *checkpoint):
    """Train under FSDP2 in two processes."""
    save_config(config, path)
    worker = Path(__file__).with_name("sharded_worker.py")
    run_two(worker, path, *checkpoint)


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / METRICS_FILE) if not r.get("evaluation")]


def test_two_processes_equal_one_and_one_goes_on_from_their_checkpoint(make_config, tmp_path):
    options = {
        "model": {"layers": MEMORY},
        "steps": 20,
        "curriculum": [Stage(length=32, window=8, until=0.5), Stage(length=64)],
        "carry_state": True,
        "micro_batch_rows": 1,
        "evaluation_rows": 4,
        "save_every": 14,
    }
    one, two = make_config("one", **options), make_config("two", **options)
    single = Trainer(one).run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert len(losses(two.output_dir)) == 20
    assert losses(two.output_dir) == pytest.approx(losses(one.output_dir), abs=1e-5)
    final = read_metrics(two.output_dir / METRICS_FILE)[-1]
    assert final["bits"] == pytest.approx(single.after["bits"], abs=1e-5)

    # The lanes of both processes are in the checkpoint.
    again = make_config("again", **options)
    Trainer(again, resume=two.output_dir / "checkpoints" / "step_000014").run()
    assert losses(again.output_dir) == pytest.approx(losses(one.output_dir)[14:], abs=1e-5)


def test_tables_updated_by_rows_in_two_processes_equal_those_of_one(make_config, tmp_path):
    ffn = {"type": "product_key", "num_keys": 32, "num_heads": 2, "top_k": 4}
    options = {
        "model": {"layers": [{"mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}]},
        "steps": 6,
        "value_optimizer": "lazy_adam",
        "clip_norm": 0.5,
        "save_every": 3,
    }
    one, two = make_config("one", **options), make_config("two", **options)
    Trainer(one).run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert losses(two.output_dir) == pytest.approx(losses(one.output_dir), abs=1e-5)
    again = make_config("again", **options)
    Trainer(again, resume=two.output_dir / "checkpoints" / "step_000003").run()
    assert losses(again.output_dir) == pytest.approx(losses(one.output_dir)[3:], abs=1e-5)


@pytest.mark.parametrize("by", ["columns", pytest.param("rows", marks=pytest.mark.slow)])
def test_tables_held_by_two_processes_equal_those_of_one(make_config, tmp_path, by):
    ffn = {"type": "product_key", "num_keys": 16, "num_heads": 2, "top_k": 4, "share": "table"}
    layer = {"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}
    options = {
        "model": {"layers": [layer]},
        "steps": 6,
        "value_optimizer": "lazy_adam" if by == "columns" else "rowwise_adagrad",
        "clip_norm": 0.5,
        "save_every": 3,
        "evaluation_rows": 4,
    }
    one = make_config("one", **options)
    two = make_config("two", memory_parallel=2, memory_shard=by, **options)
    trainer = Trainer(one)
    trainer.run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert losses(two.output_dir) == pytest.approx(losses(one.output_dir), abs=1e-5)
    # What they saved is whole: one process goes on with it.
    loaded = AutoModelForCausalLM.from_pretrained(two.output_dir)
    table = loaded.state_dict()["model.shared.table.weight"]
    torch.testing.assert_close(
        table, trainer.model.state_dict()["model.shared.table.weight"], rtol=0, atol=1e-4
    )
    again = make_config("again", **options)
    Trainer(again, resume=two.output_dir / "checkpoints" / "step_000003").run()
    assert losses(again.output_dir) == pytest.approx(losses(one.output_dir)[3:], abs=1e-5)


def test_sharded_weights_train_save_and_resume_like_whole_ones(make_config, tmp_path):
    options = {"steps": 6, "model": {"layers": MEMORY}, "save_every": 3, "evaluation_rows": 4}
    names = ("plain", "whole", "again")
    plain, whole, again = (make_config(name, **options) for name in names)
    trainer = Trainer(plain)
    trainer.run()
    for config, checkpoint in (
        (whole, []),
        (again, [str(whole.output_dir / "checkpoints" / "step_000003")]),
    ):
        # A launch each: the end of a run takes the process group down.
        launch_sharded(config, tmp_path / f"{config.output_dir.name}.yaml", *checkpoint)
    assert losses(whole.output_dir) == pytest.approx(losses(plain.output_dir), abs=1e-5)
    assert losses(again.output_dir) == losses(whole.output_dir)[3:]
    loaded = AutoModelForCausalLM.from_pretrained(whole.output_dir)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(tensor, loaded.state_dict()[name], atol=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("memory_parallel", [1, 2])
def test_tables_stay_out_of_sharded_weights(make_config, tmp_path, memory_parallel):
    ffn = {"type": "product_key", "num_keys": 16, "num_heads": 2, "top_k": 4}
    layer = {"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}
    options = {"model": {"layers": [layer]}, "steps": 6, "value_optimizer": "lazy_adam"}
    plain = make_config("plain", **options)
    sharded = make_config("sharded", memory_parallel=memory_parallel, **options)
    trainer = Trainer(plain)
    trainer.run()
    launch_sharded(sharded, tmp_path / "sharded.yaml")
    assert losses(sharded.output_dir) == pytest.approx(losses(plain.output_dir), abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(sharded.output_dir).state_dict()
    name = "model.layers.0.ffn.module.values.weight"
    expected = trainer.model.state_dict()[name]
    torch.testing.assert_close(loaded[name], expected, rtol=0, atol=1e-4)


def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(make_config, tmp_path):
    config = make_config()
    done = launch(["--cpu", "--num_processes", "2"], config, tmp_path / "run.yaml")
    assert "error: asked for several processes but only one was started" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr
    assert not config.output_dir.exists()


def test_processes_that_do_not_find_each_other_are_noticed(make_config, monkeypatch):
    # `accelerate launch --multi_gpu` without GPUs starts two runs that know nothing of each other.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes but 1 take part"):
        check_processes(1, make_config().train)


def test_rows_that_cannot_be_shared(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="4 rows of 64 tokens cannot be shared by 3 processes"):
        check_processes(3, make_config().train)
