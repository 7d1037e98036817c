"""Trains a config under FSDP2 on CPU processes, from the start or from a checkpoint.

Run by torchrun: sharded_worker.py FILE.yaml [CHECKPOINT]
"""

import os
import sys

from torch.distributed.fsdp import FSDPModule

from memlm.config import load_config
from memlm.training import trainer
from tests.training.launching import sharded_accelerator

trainer.build_accelerator = sharded_accelerator

path, *checkpoint = sys.argv[1:]
run = trainer.Trainer(load_config(path), resume=checkpoint[0] if checkpoint else False)
assert all(isinstance(block, FSDPModule) for block in run.model.model.layers)
run.run()
sys.stdout.flush()
# FSDP2 keeps its process group for ever, and a thread of gloo that releases a tensor while the
# interpreter shuts down aborts the process.
os._exit(0)
