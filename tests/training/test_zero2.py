"""DeepSpeed ZeRO-2 on two processes has the losses and weights of one process, and of DDP."""

import dataclasses
import importlib.util
import math
import os
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.training import Trainer, trainer, zero2
from memlm.training.loss import RowLoss
from memlm.training.retention import checkpoint_path
from tests.memory.processes import run_processes
from tests.training import launching
from tests.training.launching import Job, dropped_out, save_base, train_in_two
from tests.training.test_processes import assert_same_weights, losses

with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
ATTENTION = {"type": "sliding_attention", "window": 16, "num_heads": 2}
TITANS = {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 16}
TABLE = {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4}
GATED_DELTA = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
LAYERS = [
    {"mixer": ATTENTION, "memory": TITANS, "ffn": TABLE},
    {"mixer": "min_gru", "memory": GATED_DELTA},
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing its curves takes a run as long as all the rest."""
    monkeypatch.setattr(trainer, "plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def built():
    """What DeepSpeed compiles for processes on a CPU takes longer than they wait for each other."""
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


@with_deepspeed
@pytest.mark.usefixtures("built")
def test_two_processes_have_the_numbers_of_one(make_config):
    options = {"model": {"layers": LAYERS}, "steps": 4, "carry_state": True, "clip_norm": 0.1}
    options |= {"micro_batch_rows": 1, "save_every": 2, "value_optimizer": "lazy_adam"}
    names = ("one", "two", "one after two", "two after one", "parts", "two after parts")
    one, two, one_after, two_after, parts, parts_after = (
        make_config(name, **options) for name in names
    )
    Trainer(one).run()
    train_in_two(
        Job(two, zero2=True),
        Job(two_after, checkpoint_path(one.output_dir, 2), zero2=True),
        Job(parts, sharded=True),
        Job(parts_after, checkpoint_path(parts.output_dir, 2), zero2=True),
    )
    Trainer(one_after, checkpoint_path(two.output_dir, 2)).run()
    for other, steps in ((two, 4), (two_after, 2), (one_after, 2), (parts_after, 2)):
        assert losses(other) == pytest.approx(losses(one)[-steps:], rel=1e-5)
        assert_same_weights(other, one, **CLOSE)


def train_with(cases):
    """Runs whose passes are changed: a process without memories, or a second step of NaN."""
    original = RowLoss.forward
    for name, jobs in cases.items():
        for job in jobs:
            calls = []

            def forward(row_loss, *given, name=name, calls=calls):
                calls.append(None)
                alone = name == "unreached" and dist.get_rank() == 1
                loss, sums, states = original(row_loss, *given, use_memory=not alone)
                factor = math.nan if name == "broken" and len(calls) == 2 else 1.0
                return loss * factor, sums * factor, states

            with mock.patch.object(RowLoss, "forward", forward):
                launching._train((job,), False)


@with_deepspeed
@pytest.mark.usefixtures("built")
def test_two_processes_have_the_numbers_of_ddp(make_config, tmp_path):
    base = save_base(tmp_path / "base")
    layers = [{"mixer": ATTENTION, "memory": GATED_DELTA, "ffn": "swiglu"}] * 2
    cases = {
        "unreached": {},
        "broken": {"carry_state": True},
        "bf16": {"mixed_precision": "bf16"},
        "together": {"sequence_parallel": 2},
        "recompute": {"activations": "recompute"},
    }
    jobs = {}
    for name, options in cases.items():
        configs = [
            make_config(f"{name} {kind}", {"layers": layers}, steps=3, **options) for kind in "ab"
        ]
        jobs[name] = (Job(configs[0]), Job(configs[1], zero2=True))
    attached = [dropped_out(make_config, base, f"attached {kind}", steps=3) for kind in "ab"]
    jobs["attached"] = (Job(attached[0]), Job(attached[1], zero2=True))
    run_processes(2, train_with, jobs)
    for name, (ddp, sharded) in jobs.items():
        one, two = losses(ddp.config), losses(sharded.config)
        assert (one[1] is None) == (two[1] is None) == (name == "broken")
        rounding = 1e-3 if name == "bf16" else 1e-5
        made = [step for step in range(3) if one[step] is not None]
        assert [two[step] for step in made] == pytest.approx([one[s] for s in made], rel=rounding)
        file = "memory.safetensors" if name == "attached" else "model.safetensors"
        mine, theirs = (load_file(job.config.output_dir / file) for job in (ddp, sharded))
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            close = {"rtol": 0, "atol": 1e-2} if name == "bf16" else CLOSE
            torch.testing.assert_close(theirs[key], tensor, **close, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "muon"}, "train.optimizer: muon does not work under DeepSpeed"),
        ({"optimizer": "spam"}, "train.optimizer: spam does not work under DeepSpeed"),
        ({"memory_parallel": 2}, "train.memory_parallel: tables in parts"),
        ({"reinit_keys_after": 5}, "train.reinit_keys_after: does not work"),
        ({"compile": True}, "train.compile: does not work"),
        (
            {"backprop": "replay", "replay_segment": 8},
            "train.backprop: replay does not work under DeepSpeed",
        ),
    ],
)
def test_what_it_cannot_train_is_refused(monkeypatch, options, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    zero2.check(TrainConfig(), 2)
    with pytest.raises(UserError, match=said):
        zero2.check(dataclasses.replace(TrainConfig(), **options), 2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DEEPSPEED_ZERO_STAGE", "3", "zero_stage: 3 is not supported"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: cpu is not"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: nvme is not"),
        ("DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file: is not supported"),
        ("GRADIENT_CLIPPING", "1.0", "gradient_clipping: .* use train.clip_norm"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: must be 1"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(monkeypatch, name, value, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=said):
        zero2.check(TrainConfig(), 2)


def test_a_run_needs_deepspeed_and_several_processes(monkeypatch, make_config):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: pip install .memlm\[deep"):
        Trainer(make_config())
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(UserError, match="there is only one"):
        Trainer(make_config())
