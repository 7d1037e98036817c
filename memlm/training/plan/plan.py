"""What a training run needs on given GPUs: memory, work, messages, time."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from memlm.config import TrainConfig
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.plan.footprint import Device, Footprint, Rows, footprint
from memlm.training.plan.gpus import GIB, Cluster
from memlm.training.plan.traffic import Traffic, sequence_traffic, traffic
from memlm.training.plan.weights import BFLOAT, FLOAT, Parallel, Weights, weights_of
from memlm.training.setup import check_shares
from memlm.training.throughput import training_flops

RESERVED = 2.0  # GiB of CUDA's context, NCCL's buffers and kernels' workspaces
FRAGMENTS = 0.05  # of the memory, lost between the allocator's blocks
_GATHERED = 2  # blocks whose weights FSDP2 has whole: the one that runs, and the next
_AGAIN = ("recompute", "recompute_offload")
Prepare = Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, that of the largest shard.

    Attributes:
        parameters: weights outside the value tables that learn by rows.
        gradients: of these, when the backward pass has ended.
        buckets: copies of gradients on their way, of DDP.
        accumulated: whole gradients that earlier micro-batches left, of FSDP2.
        moments: optimizer state of the weights.
        gathered: weights of other processes that are there for a moment, with their gradients.
        tables: values of value tables that learn by rows.
        table_moments: their optimizer state.
        reads: what waits for their update; with that of other processes, when it is made.
        states: memory states that rows carry to the next step.
        passes: the passes of a micro-batch.
        own_reads: of `reads`, those of this process.
    """

    parameters: int
    gradients: int
    buckets: int
    accumulated: int
    moments: int
    gathered: int
    tables: int
    table_moments: int
    reads: int
    states: int
    passes: Footprint
    own_reads: int

    @property
    def always(self) -> int:
        """What is there from step to step."""
        fixed = (self.parameters, self.moments, self.buckets, self.tables, self.table_moments)
        return sum(fixed) + self.states

    @property
    def in_passes(self) -> int:
        """The most while a micro-batch runs."""
        moving = self.passes.kept + self.passes.working + self.gathered
        return self.always + self.accumulated + moving + self.own_reads

    @property
    def in_update(self) -> int:
        """The most while the optimizers work."""
        return self.always + self.gradients + self.reads

    @property
    def peak(self) -> int:
        return max(self.in_passes, self.in_update)


@dataclasses.dataclass(frozen=True)
class Plan:
    """See `make_plan`.

    Attributes:
        cluster: the GPUs.
        options: of the run.
        parallel: how weights are shared.
        rows: of a micro-batch on a process.
        micro_batches: of a step.
        weights: of the model.
        memory: of a GPU.
        flops: of the model in a step, on all GPUs.
        again: FLOPs of what is computed twice.
        traffic: messages of a step.
        compute_seconds: of the matrix products, and of reading value tables.
        update_seconds: of the optimizers.
    """

    cluster: Cluster
    options: TrainConfig
    parallel: Parallel
    rows: Rows
    micro_batches: int
    weights: Weights
    memory: Memory
    flops: float
    again: float
    traffic: list[Traffic]
    compute_seconds: float
    update_seconds: float

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that tensors can have."""
        memory = self.cluster.gpu.memory
        return (memory * (1 - FRAGMENTS) - RESERVED) * GIB

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable

    @property
    def beside_seconds(self) -> float:
        """Of the messages that run beside the computing."""
        return sum(item.seconds(self.cluster) for item in self.traffic if item.beside)

    @property
    def waiting_seconds(self) -> float:
        """Of the messages that everything waits for."""
        return sum(item.seconds(self.cluster) for item in self.traffic if not item.beside)

    @property
    def step_seconds(self) -> float:
        computing = max(self.compute_seconds, self.beside_seconds)
        return computing + self.waiting_seconds + self.update_seconds


def make_plan(
    config: MemLMConfig,
    options: TrainConfig,
    cluster: Cluster,
    parallel: Parallel = "fsdp2",
    *,
    document: int = 1024,
    prepare: Prepare = lambda model: None,
    device: Device = "gpu",
) -> Plan:
    """Plan the steps of the last stage of a run.

    Args:
        config: of the model.
        options: of the run.
        cluster: the GPUs, one process each.
        parallel: how weights are shared: "ddp", "fsdp2", or "zero2" (DeepSpeed).
        document: tokens of each document in the rows.
        prepare: changes a model that was built (freezes weights, say).
        device: whose implementations are counted: a GPU's, or plain torch on a CPU.

    Raises:
        UserError: for processes that cannot share rows or tables.
    """
    check_shares(cluster.count, options)
    stage, together = options.stages()[-1], options.sequence_parallel
    with torch.device("meta"):
        model = MemLMForCausalLM(config)
    prepare(model)
    model.set_attention_window(stage.window)
    weights = weights_of(model, options)
    own = options.tokens_per_step // stage.length // (cluster.count // together)
    most = min(options.micro_batch_rows or own, own)
    length = min(options.replay_segment or stage.length, stage.length)
    segments = -(-stage.length // length)
    rows = Rows(most, stage.length, min(document, stage.length), options.carry_state, together)
    columns = rows.columns
    batches = [most * columns] * (own // most) + [own % most * columns] * (own % most > 0)

    sharded = parallel == "fsdp2" and cluster.count > 1
    low = options.mixed_precision == "bf16"
    passes = footprint(
        config,
        rows if segments == 1 else dataclasses.replace(rows, length=length, continued=True),
        options.activations,
        blockwise_tokens=options.blockwise_tokens,
        mixed_precision=options.mixed_precision,
        low_precision_weights=low and (sharded or parallel == "zero2"),
        by_rows=bool(weights.tables),
        prepare=prepare,
        window=stage.window,
        device=device,
    )
    keeps = options.activations in ("keep", "selective")
    passes = _with_shared_reads(passes, weights, batches[0] // segments, keeps)
    if segments > 1:  # replay keeps the states between them
        states = passes.states if options.carry_state else 0
        kept = passes.kept + (segments - 1) * passes.states
        passes = dataclasses.replace(passes, kept=kept, states=states)
    memory = _memory(weights, options, parallel, cluster.count, batches, passes, own / most)

    flops = training_flops(model, stage.length) * options.tokens_per_step
    forward = model.flops(stage.length) / stage.length * options.tokens_per_step
    again = forward * (segments - 1) / segments
    if options.activations in _AGAIN:
        again += forward - 2 * model.lm_head.weight.numel() * options.tokens_per_step
    peak = cluster.gpu.peak(options.mixed_precision) * cluster.compute_share
    reading, updating = _table_traffic(weights, batches, options.tokens_per_step)
    # Adam reads and writes a weight and two moments, and reads a gradient.
    moved = 3.5 * memory.moments + memory.reads + updating
    return Plan(
        cluster,
        options,
        parallel,
        rows,
        len(batches),
        weights,
        memory,
        flops,
        again,
        [
            *traffic(weights, options, parallel, cluster.count, batches),
            *sequence_traffic(passes.sent, together, own / most),
        ],
        (flops + again) / cluster.count / peak + cluster.memory_seconds(reading),
        cluster.memory_seconds(moved),
    )


def _table_traffic(weights: Weights, batches: list[int], tokens: int) -> tuple[float, float]:
    """Bytes of a GPU's memory that value tables move in a step: by reads, and by updates.

    Args:
        weights: of the model.
        batches: tokens of the micro-batches of a process.
        tokens: of the whole step.
    """
    reading = updating = 0.0
    for table in weights.tables:
        shared = table.shared
        # Forward, and backward for the gradients of the weights.
        rows = sum(batches) * shared.bag * table.layers
        reading += 2 * rows * shared.width * shared.value_bytes
        touched = shared.distinct_rows(tokens * table.layers) / shared.slots
        updating += 2 * touched * (table.value_bytes + table.moment_bytes)
    return reading, updating


def _with_shared_reads(passes: Footprint, weights: Weights, tokens: int, keeps: bool) -> Footprint:
    """What layers keep besides when several processes hold a table together."""
    more = []
    for table in weights.tables:
        shared = table.shared
        if shared.processes == 1:
            continue
        if shared.by == "columns":  # indices and weights of the others' tokens
            each = (shared.processes - 1) * tokens * shared.bag * 2 * FLOAT
        else:  # the rows that the tokens read
            each = shared.distinct_rows(tokens) * shared.width * shared.value_bytes
        more += [math.ceil(each)] * table.layers
    if keeps:
        return dataclasses.replace(passes, kept=passes.kept + sum(more))
    return dataclasses.replace(passes, working=passes.working + max(more, default=0))


def _memory(
    weights: Weights,
    options: TrainConfig,
    parallel: Parallel,
    processes: int,
    batches: list[int],
    passes: Footprint,
    parts: float,
) -> Memory:
    dense, tables = weights.dense, weights.tables
    trained = sum(weight.numbers for weight in dense if weight.trains)
    shards = sum(weight.shard(processes) for weight in dense)
    trained_shards = sum(weight.shard(processes) for weight in dense if weight.trains)
    moments = sum(weight.moments * weight.numbers for weight in dense)
    moment_shards = sum(weight.moments * weight.shard(processes) for weight in dense)
    low = BFLOAT if options.mixed_precision == "bf16" else FLOAT

    buckets = accumulated = gathered = 0
    several = len(batches) > 1
    if processes == 1:
        parameters, gradients, state = weights.numbers, trained, moments
        accumulated = trained * several
    elif parallel == "ddp":
        parameters, gradients, state = weights.numbers, trained, moments
        buckets, accumulated = trained, trained * several
    elif parallel == "fsdp2":
        parameters, gradients, state = shards, trained_shards, moment_shards
        accumulated = trained * several
        units = weights.unit_numbers(processes)
        blocks = sorted(n for block, n in units.items() if block is not None)
        whole = units[None] + sum(blocks[-_GATHERED:])
        gathered = low * whole + FLOAT * max(blocks[-1:], default=0)
    else:  # bfloat16 weights beside float32 ones in shards
        parameters = weights.numbers * low // FLOAT + shards
        gradients, state = trained_shards, moment_shards
        accumulated = trained_shards

    reads = own_reads = 0.0
    for table in tables:
        own = table.waiting_bytes(batches)
        own_reads += own
        reads += own * (processes // table.shared.processes)
    return Memory(
        parameters=FLOAT * parameters,
        gradients=FLOAT * gradients,
        buckets=FLOAT * buckets,
        accumulated=FLOAT * accumulated,
        moments=FLOAT * state,
        gathered=gathered,
        tables=math.ceil(sum(table.value_bytes for table in tables)),
        table_moments=math.ceil(sum(table.moment_bytes for table in tables)),
        reads=math.ceil(reads),
        states=math.ceil(passes.states * parts),
        passes=passes,
        own_reads=math.ceil(own_reads),
    )
