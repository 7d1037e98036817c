"""What the processes of a run really hold and send, to compare with its plan."""

import os
from collections.abc import Iterable
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlm.memory import ValueTable
from memlm.training import trainer
from memlm.training.row_optimizer import RowOptimizer
from tests.training.launching import Job, set_environment, sharded_accelerator


class Sent(TorchDispatchMode):
    """Bytes of the tensors that each collective takes or gives, the larger, by its name."""

    def __init__(self):
        super().__init__()
        self.nbytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2].strip("_")
            sizes = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
            self.nbytes[name] = self.nbytes.get(name, 0) + max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): local(t).nbytes for t in tensors}.values())


def measure(jobs: list[Job]) -> list[dict[str, float]]:
    """What this process sends in a step of each run, and has in the last one."""
    set_environment()
    os.environ["MEMLM_KERNELS"] = "eager"
    found = []
    for job in jobs:
        AcceleratorState._reset_state(reset_partial_state=True)
        build = sharded_accelerator if job.sharded else trainer.build_accelerator
        with (
            mock.patch.object(trainer, "build_accelerator", build),
            mock.patch.object(trainer, "plot_run"),
            mock.patch.object(trainer, "save_model"),
            mock.patch.object(trainer, "save_checkpoint"),
        ):
            found.append(_measure_run(trainer.Trainer(job.config)))
    return found


def _measure_run(run: trainer.Trainer) -> dict[str, float]:
    seen: dict[str, float] = {"kept": 0}
    saved, clip, step = run.passes.forward, trainer.clip_gradients, run._one_step
    tables = {id(m.weight) for m in run.model.modules() if isinstance(m, ValueTable) and m.pending}

    def counted(*args, **kwargs):
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            base = tensor if tensor._base is None else tensor._base
            if not isinstance(base, nn.Parameter) and id(base) not in tables:
                storage = local(tensor).untyped_storage()
                storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = saved(*args, **kwargs)
        carried = [t for state in (args[1] or {}).values() for t in state.tensors().values()]
        given = (*args[0].values(), *carried)
        for tensor in (*run.model.parameters(), *run.model.buffers(), *given):
            storages.pop(local(tensor).untyped_storage()._cdata, None)
        seen["kept"] = sum(storage.nbytes() for storage in storages.values())
        return result

    def before_clipping(parameters, optimizers, limit):
        parameters = list(parameters)
        seen["gradients"] = nbytes(p.grad for p in parameters if p.grad is not None)
        rows = [one for one in optimizers if isinstance(one, RowOptimizer)]
        reads = [r for one in rows for table in one.tables for r in table.pending.reads]
        seen["reads"] = sum(nbytes((r.indices, r.weights, r.grad)) for r in reads)
        return clip(parameters, optimizers, limit)

    def one_step():
        with Sent() as sent:
            loss = step()
        if run.step < run.options.steps:  # the last step tells of the tables' use as well
            seen["sent"] = sent.nbytes
        return loss

    with mock.patch.object(trainer, "clip_gradients", before_clipping):
        run.passes.forward, run._one_step = counted, one_step
        run.run()
    dense = [p for p in run.model.parameters() if id(p) not in tables]
    apart = [p for p in run.model.parameters() if id(p) in tables]
    seen["parameters"], seen["tables"] = nbytes(dense), nbytes(apart)
    states = {"moments": [], "table_moments": []}
    for optimizer in run.optimizers:
        kind = "table_moments" if isinstance(optimizer, RowOptimizer) else "moments"
        states[kind] += [t for entry in optimizer.state.values() for t in entry.values()]
    seen |= {kind: nbytes(tensors) for kind, tensors in states.items()}
    seen["states"] = sum(
        state.nbytes for part in run.lanes.states for state in (part or {}).values()
    )
    logging_data = getattr(run.row_loss, "_get_ddp_logging_data", dict)()
    seen["buckets"] = (
        sum(map(int, str(logging_data.get("bucket_sizes", "")).split(", ")))
        if (logging_data)
        else 0
    )
    return seen
