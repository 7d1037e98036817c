"""Trains a config under FSDP2 on CPU processes, from the start or from a checkpoint.

Accelerate turns FSDP on a CPU silently into DDP; setting its state by hand lifts that guard, so
that the sharded path runs without a GPU. Run by torchrun: sharded_worker.py FILE.yaml [CHECKPOINT]
"""

import os
import sys

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from memlm.config import load_config
from memlm.training import trainer


def sharded_accelerator(config):
    accelerator = build_accelerator(config)
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


build_accelerator = trainer.build_accelerator
trainer.build_accelerator = sharded_accelerator

path, *checkpoint = sys.argv[1:]
run = trainer.Trainer(load_config(path), resume=checkpoint[0] if checkpoint else False)
assert all(isinstance(block, FSDPModule) for block in run.model.model.layers)
run.run()
sys.stdout.flush()
# FSDP2 keeps its process group for ever, and a thread of gloo that releases a tensor while the
# interpreter shuts down aborts the process.
os._exit(0)
