"""Runs in two processes on a CPU."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.config import RunConfig
from memlm.data import ByteTokenizer
from memlm.training import setup, trainer
from memlm.training.feed import RowFeed
from memlm.training.loss import group_counts
from memlm.training.zero2 import is_engine
from tests.memory.processes import run_processes

ROOT = Path(__file__).parents[2]
Seen = dict[str, list[Tensor]]


def run_two(*words: str | Path) -> str:
    """What a script and its arguments print when torchrun starts it twice.

    Raises:
        AssertionError: with what it wrote to stderr, when a process fails.
    """
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", *map(str, words)],
        timeout=300,
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Job:
    """A training run.

    Attributes:
        config: of the run.
        resume: as `Trainer` takes it.
        sharded: under FSDP2.
        zero2: under DeepSpeed ZeRO-2.
    """

    config: RunConfig
    resume: bool | str | Path = False
    sharded: bool = False
    zero2: bool = False


def train_in(count: int, *jobs: Job, double: bool = False) -> list[list[Seen]]:
    """Do runs one after another in the same processes, much faster than a launch of each.

    Args:
        count: of the processes.
        jobs: the runs.
        double: in float64.

    Returns:
        What each process saw in each run (see `watched`).
    """
    return run_processes(count, _train, jobs, double)


def train_in_two(*jobs: Job, double: bool = False) -> list[list[Seen]]:
    """Do runs one after another in two processes."""
    return train_in(2, *jobs, double=double)


def launch_sharded(config: RunConfig) -> None:
    """Train under FSDP2 in two processes."""
    train_in_two(Job(config, sharded=True))


def set_environment() -> None:
    """What a launcher tells a process of a run, here one of `run_processes`."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=count,
        LOCAL_WORLD_SIZE=count,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        ACCELERATE_USE_CPU="true",
        FORK_LAUNCHED="1",  # the end of a run leaves the process group to the next
    )


def _train(jobs: tuple[Job, ...], double: bool) -> list[Seen]:
    set_environment()
    found = []
    for job in jobs:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(ACCELERATE_USE_DEEPSPEED=str(job.zero2).lower())
        with contextlib.ExitStack() as changes:
            if double:
                changes.enter_context(in_float64())
            if job.sharded:
                patch = mock.patch.object(trainer, "build_accelerator", sharded_accelerator)
                changes.enter_context(patch)
            changes.enter_context(mock.patch.object(trainer, "plot_run"))  # takes half of the time
            seen = changes.enter_context(watched())
            run = trainer.Trainer(job.config, resume=job.resume)
            assert any(isinstance(m, FSDPModule) for m in run.model.modules()) == job.sharded
            assert is_engine(run.row_loss) == job.zero2
            run.run()
            found.append(seen)
    return found


def sharded_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate turns FSDP on a CPU silently into DDP; setting its state lifts that guard."""
    accelerator = setup.build_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    assert accelerator.is_fsdp2
    return accelerator


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models are built and loaded in float64, so that another order of sums makes no difference."""
    model, load = setup.MemLMForCausalLM, setup.MemLMForCausalLM.from_pretrained

    def load_double(source, **options):
        return load(source, **(options | {"dtype": torch.float64}))

    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(model, "from_pretrained", load_double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Notes what a process trains on.

    Gives "rows", the rows of each step; "targets", the numbers of its targets by group; and
    "masks", what each call of a dropout module dropped of the first 64 entries.
    """
    seen: Seen = {"rows": [], "targets": [], "masks": []}
    get, forward = RowFeed.get, nn.Dropout.forward

    def noted_get(feed, step):
        batch = get(feed, step)
        seen["rows"].append(batch["input_ids"])
        seen["targets"].append(group_counts(batch))
        return batch

    def noted_forward(module, values):
        result = forward(module, values)
        if module.training:
            seen["masks"].append(result.flatten()[:64] == 0)
        return result

    with (
        mock.patch.object(RowFeed, "get", noted_get),
        mock.patch.object(nn.Dropout, "forward", noted_forward),
    ):
        yield seen


def save_base(folder: Path) -> Path:
    """A tiny Llama that reads bytes, in `folder`."""
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


def dropped_out(
    make_config: Callable[..., RunConfig], base: Path, name: str, **options: Any
) -> RunConfig:
    """Adapters with dropout (no memory module has any), beside a memory that carries states."""
    config = make_config(name, **options)
    memory = {"type": "knn_cache", "capacity": 64, "segment": 8, "key_size": 8, "top_k": 4}
    attach = {"memory": memory, "layers": [1], "window": 16}
    attach["lora"] = {"r": 2, "alpha": 4, "dropout": 0.3}
    config.model = {"pretrained": str(base), "attach": attach}
    return config
