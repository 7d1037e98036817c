"""What a training run needs, before it is launched: `python -m memlm.training.plan --help`."""

from memlm.training.plan.gpus import GPUS, Cluster, Gpu, find_gpu
from memlm.training.plan.plan import Memory, Plan, make_plan

__all__ = ["GPUS", "Cluster", "Gpu", "Memory", "Plan", "find_gpu", "make_plan"]
