"""What every process does in test_parallel.py: two steps of tiny models with memories."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from memlm import MemLMForCausalLM
from memlm.training.fully_sharded import shard_by_blocks
from memlm.training.loss import Batch, RowLoss, group_coefficients, group_counts
from tests.memory.contract import (
    GATED_DELTA,
    KNN_CACHE,
    LACT,
    MEMORIZING,
    PRODUCT_KEY,
    TITANS,
    TITANS_ATTENTION,
    cases,
)
from tests.memory.law_tools import ATTENTION, VOCABULARY, build_model

ROWS, LENGTH, STEPS = 4, 24, 2
KINDS = ("ddp", "fsdp2")
ALL = "all at once"
Found = dict[str, Tensor]


def names() -> list[str]:
    """Every memory at every site, and a model with several of them.

    Batch statistics are those of a process's rows, so one process has others.
    """
    found = [str(case) for case in cases() if case.spec.options.get("query_norm") != "batch"]
    return [*found, ALL]


def all_layers() -> list[dict[str, Any]]:
    """Every memory, with a table and a store that layers share.

    The steps that orthogonalise the updates of lact would amplify the rounding of all others.
    """

    def entry(name: str, **options: Any) -> dict[str, Any]:
        return {"type": name, **options}

    table = entry("product_key", **PRODUCT_KEY, share="table")
    store = entry("knn_cache", **KNN_CACHE, share="store")
    mac = entry("titans", variant="mac", **TITANS, **TITANS_ATTENTION)
    heads = {"num_heads": 2, "head_dim": 8}
    lact = entry("lact", **{**LACT, "orthogonalise": False}, parallel=True)
    linear = entry("linear_attention", **heads)
    return [
        {"mixer": entry("gated_delta", **GATED_DELTA), "memory": store, "ffn": table},
        {"mixer": entry("memorizing_attention", **MEMORIZING), "memory": lact, "ffn": "swiglu"},
        {"mixer": ATTENTION, "memory": store, "ffn": table},
        {"mixer": mac, "memory": linear, "ffn": None},
        {"mixer": entry("retention", **heads), "memory": "min_lstm", "ffn": "swiglu"},
        {"mixer": "min_gru", "memory": entry("titans", **TITANS), "ffn": None},
    ]


def build(name: str, dtype: torch.dtype) -> MemLMForCausalLM:
    """The model of a case, the same on every process."""
    if name == ALL:
        return build_model(all_layers(), dtype, output={"type": "neural_cache", "capacity": 12})
    case = next(case for case in cases() if str(case) == name)
    stable = case.spec.stable if dtype == torch.float32 else {}
    return case.build(dtype, repeat=case.repeat, **stable)


def rows(step: int) -> Batch:
    """All rows of a step: documents that end inside, go on in the next step, and padding.

    The last row has three tokens in the first step and none in the second, so that a process may
    have nothing to do.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    segments = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    positions = torch.arange(LENGTH).repeat(ROWS, 1) + step * LENGTH
    for row, border in ((1, 9), (2, 17)):
        segments[row, border:] = 2
        positions[row, border:] -= border + step * LENGTH
    segments[3, 3 * (1 - step) :] = 0
    # Processes have unequal numbers of targets.
    share = torch.tensor([0.9, 0.2, 0.6, 0.9])
    targets = torch.rand(ROWS, LENGTH, generator=generator) < share[:, None]
    groups = torch.randint(0, 2, (ROWS, LENGTH), generator=generator)
    labels = torch.where(targets & (segments > 0), ids.roll(-1, 1), -100)
    return {
        "input_ids": ids,
        "segment_ids": segments,
        "position_ids": positions,
        "labels": labels,
        "loss_groups": groups,
    }


def train(name: str, kind: str | None, dtype: torch.dtype = torch.float64) -> Found:
    """Losses, gradients and last weights of two steps, the second with carried states.

    Args:
        name: of a case.
        dtype: of the weights.
        kind: "ddp" or "fsdp2", each process with its share of the rows; None = one with all.
    """
    processes, rank = (dist.get_world_size(), dist.get_rank()) if kind else (1, 0)
    share = ROWS // processes
    model = build(name, dtype).train()
    loss = RowLoss(model)
    wrapped: nn.Module = loss
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(loss, find_unused_parameters=True)
    elif kind == "fsdp2":
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False
        )
        shard_by_blocks(loss, model.model.layers, mp_policy=policy)
        assert all(isinstance(block, FSDPModule) for block in model.model.layers)
        assert all(isinstance(parameter, DTensor) for parameter in loss.parameters())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    found, states = {}, None
    for step in range(STEPS):
        batch = rows(step)
        coefficients = group_coefficients(group_counts(batch), {"text": 1.0, "answer": 0.5})
        own = {key: part[rank * share : (rank + 1) * share] for key, part in batch.items()}
        # Data parallelism averages the gradients; the sum is wanted.
        part, sums, states = wrapped(own, states, coefficients * processes, carry=True)
        part.backward()
        total = (sums * coefficients).sum()
        if kind:
            dist.all_reduce(total)
        found[f"loss {step}"] = total
        for key, parameter in loss.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} of {key}"] = whole(parameter.grad).clone()
        optimizer.step()
        optimizer.zero_grad()
    for key, parameter in loss.named_parameters():
        found[f"weight of {key}"] = whole(parameter.detach()).clone()
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_all(
    wanted: list[str], kinds: tuple[str, ...], dtype: torch.dtype
) -> dict[str, dict[str, Found]]:
    """What this process has of every case; the others hold the same."""
    found = {name: {kind: train(name, kind, dtype) for kind in kinds} for name in wanted}
    return found if dist.get_rank() == 0 else {}
