"""A plan in words and numbers."""

from collections.abc import Callable, Iterator

from memlm.errors import UserError
from memlm.training.plan.gpus import GIB
from memlm.training.plan.plan import FRAGMENTS, RESERVED, Plan
from memlm.training.plan.shapes import has_kernels

MB, TERA = 1e6, 1e12
_KEPT = {
    "keep": "activations kept",
    "recompute": "inputs of the blocks",
    "selective": "activations kept (selective)",
    "offload": "activations on the GPU",
    "recompute_offload": "inputs of the blocks on the GPU",
}


def lines(plan: Plan) -> Iterator[str]:
    """All of a plan."""
    yield from _setting(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _work(plan)
    yield ""
    yield from _traffic(plan)
    yield ""
    yield from _time(plan)
    yield ""
    yield "Assumed:"
    yield from (f"- {line}" for line in assumptions(plan))


def _setting(plan: Plan) -> Iterator[str]:
    rows, cluster = plan.rows, plan.cluster
    dense, tables = (
        plan.weights.numbers,
        sum(table.shared.slots * table.shared.width for table in plan.weights.tables),
    )
    more = f" and {_count(tables)} in value tables that learn by rows" if tables else ""
    yield f"{_count(dense)} parameters{more}"
    machines = f"{cluster.nodes} machine{'s'[: cluster.nodes != 1]}"
    yield f"{cluster.count} x {cluster.gpu.device} in {machines}, {plan.parallel}"
    together = plan.options.sequence_parallel
    where = "on each GPU" if together == 1 else f"on each {together} GPUs together"
    yield (
        f"a step of {plan.options.tokens_per_step:,} tokens: {plan.micro_batches} x {rows.count} "
        f"rows of {rows.length} tokens {where}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    entries = [
        ("parameters", memory.parameters),
        ("optimizer state", memory.moments),
        ("gradients", memory.gradients),
        ("  of earlier micro-batches, whole", memory.accumulated),
        ("  on their way (DDP's buckets)", memory.buckets),
        ("weights and gradients of a block, gathered", memory.gathered),
        ("value tables", memory.tables),
        ("  optimizer state", memory.table_moments),
        ("  reads that wait, at the update", memory.reads),
        ("memory states carried", memory.states),
        (_KEPT[plan.options.activations], memory.passes.kept),
        ("working memory of the passes", memory.passes.working),
        ("most in the passes", memory.in_passes),
        ("most in the update", memory.in_update),
    ]
    yield f"{'GiB on each GPU':<44}{'':>10}"
    for name, size in entries:
        if size:
            yield f"  {name:<42}{size / GIB:>10.2f}"
    usable = f"{plan.usable / GIB:.1f} of {plan.cluster.gpu.memory} GiB can be used"
    if memory.passes.host:
        host = memory.passes.host * min(plan.cluster.per_node, plan.cluster.count) / GIB
        yield f"  in the CPU's memory, of a machine{host:>19.2f}"
    peak = memory.peak / GIB
    yield f"it {'fits' if plan.fits else 'does NOT fit'}: {peak:.1f} GiB; {usable}"


def _work(plan: Plan) -> Iterator[str]:
    yield f"{'TFLOP of a step':<44}"
    yield f"  {'forward and backward, all GPUs':<42}{plan.flops / TERA:>10.1f}"
    if plan.again:
        yield f"  {'computed a second time':<42}{plan.again / TERA:>10.1f}"
    each = (plan.flops + plan.again) / plan.cluster.count / TERA
    yield f"  {'of each GPU':<42}{each:>10.1f}"


def _traffic(plan: Plan) -> Iterator[str]:
    if not plan.traffic:
        yield "Nothing is sent between GPUs."
        return
    yield f"{'MB that a GPU gets from others in a step':<52}{'MB':>12}{'ms':>10}"
    for item in plan.traffic:
        name = f"{item.name} ({item.operation}, {item.processes} GPUs)"
        milliseconds = 1000 * item.seconds(plan.cluster)
        yield f"  {name:<50}{item.received / MB:>12.1f}{milliseconds:>10.1f}"


def _time(plan: Plan) -> Iterator[str]:
    seconds = plan.step_seconds
    yield f"{'Expected milliseconds of a step':<44}"
    for name, part in (
        ("computing", plan.compute_seconds),
        ("messages beside it", plan.beside_seconds),
        ("messages that are waited for", plan.waiting_seconds),
        ("updates of weights and tables", plan.update_seconds),
        ("the step", seconds),
    ):
        if part:
            yield f"  {name:<42}{1000 * part:>10.1f}"
    rate = plan.options.tokens_per_step / seconds
    yield f"  {rate:,.0f} tokens/s, {rate / plan.cluster.count:,.0f} on each GPU"


def assumptions(plan: Plan) -> Iterator[str]:
    """What the numbers rest on, a line each."""
    gpu, cluster = plan.cluster.gpu, plan.cluster
    low = plan.options.mixed_precision == "bf16"
    kernels = "the Triton kernels" if has_kernels() else "plain torch (Triton is not installed)"
    peak = gpu.peak(plan.options.mixed_precision) / TERA
    yield (
        f"{cluster.compute_share:.0%} of the {peak:.0f} TFLOP/s that the data sheet gives for "
        f"{'bfloat16' if low else 'float32 (TF32 where torch may)'}"
    )
    yield (
        f"{cluster.transfer_share:.0%} of {gpu.bandwidth:,.0f} GB/s of GPU memory, {gpu.link:,.0f} "
        f"GB/s to GPUs of the same machine, {gpu.network:g} GB/s per GPU to other machines"
    )
    yield f"{cluster.per_node} GPUs in a machine; rings over neighbouring processes, as NCCL's"
    if any(item.beside for item in plan.traffic):
        yield "weights and gradients travel while the GPU computes, all else while it waits"
    yield (
        f"documents of {plan.rows.document} tokens, one behind the other in each row; every token "
        "is a target"
    )
    yield f"activations: those of {kernels}, autocast as on a CPU, attention by flash kernels"
    yield (
        f"{RESERVED} GiB for CUDA, NCCL and workspaces; {FRAGMENTS:.0%} of the memory lost between "
        "the allocator's blocks"
    )
    if plan.weights.tables:
        yield "tokens read rows of value tables at random (real reads repeat more)"
    if plan.parallel == "zero2":
        yield "DeepSpeed's own buffers are not counted; no run with it was compared"
    if plan.options.sequence_parallel > 1:
        yield (
            "GPUs that hold rows together: activations and messages of the last of them, which has "
            "the most keys; waiting for each other is not counted"
        )
    if plan.options.compile:
        yield "train.compile: what it saves is not counted, neither memory nor time"
    if plan.options.activations == "selective":
        yield "activations: selective: no work or time for what it computes again (norms, gates)"
    if plan.options.blockwise_tokens is not None:
        yield "train.blockwise_tokens: what is computed again for it is not counted as work"
    if plan.options.backprop == "replay":
        yield (
            "train.backprop: replay: a segment's activations and the states between segments; "
            "weights that FSDP2 gathers again for each segment are not counted"
        )
    if plan.options.activations in ("offload", "recompute_offload"):
        yield "copies to and from the CPU's memory keep up with the computing"
    if plan.micro_batches > 1 and plan.parallel == "fsdp2":
        yield "gradients of earlier micro-batches stay whole on each GPU until the last one"


def alternatives(plan: Plan, again: Callable[..., Plan]) -> Iterator[str]:
    """What would need less memory, for a plan that does not fit.

    Args:
        plan: the plan.
        again: makes it again with other options of `TrainConfig`, or another `parallel`.
    """
    options = plan.options
    changes: list[dict] = []
    if plan.parallel == "ddp" and plan.cluster.count > 1:
        changes.append({"parallel": "fsdp2"})
    changes += [
        {"activations": policy}
        for policy in ("selective", "recompute", "recompute_offload")
        if policy != options.activations
    ]
    if plan.rows.count > 1:
        changes.append({"micro_batch_rows": 1})
        changes.append({"micro_batch_rows": 1, "activations": "recompute"})
    together = min(plan.cluster.count, plan.cluster.per_node)
    if plan.weights.tables and options.memory_parallel < together:
        changes.append({"memory_parallel": together})
        changes.append({"memory_parallel": together, "activations": "recompute"})
    for change in changes:
        try:
            other = again(**change)
        except UserError:  # does not go with the rest of the options
            continue
        told = ", ".join(
            f"--{key} {value}" if key == "parallel" else f"train.{key}: {value}"
            for key, value in change.items()
        )
        verdict = "fits" if other.fits else "does not fit"
        yield f"with {told}: {other.memory.peak / GIB:.1f} GiB, {verdict}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
