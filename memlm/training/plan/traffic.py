"""What the processes of a run send each other in a step."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from memlm.config import TrainConfig
from memlm.training.plan.gpus import Cluster
from memlm.training.plan.weights import BFLOAT, FLOAT, Parallel, Weights

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "exchange"]

_OF_ROWS: dict[Operation, str] = {
    "all-gather": "keys, values, maps of states",
    "reduce-scatter": "gradients of these",
    "exchange": "windows, states, their gradients",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of messages of a step.

    Attributes:
        name: what is sent.
        operation: the collective; an exchange is all that is none of the others.
        payload: bytes of the whole tensors that it takes or gives, of an exchange what a process
            gets from the others.
        processes: that take part.
        beside: whether it runs while the GPU computes.
    """

    name: str
    operation: Operation
    payload: float
    processes: int
    beside: bool

    @property
    def received(self) -> float:
        """Bytes that a process gets, by rings."""
        share = (self.processes - 1) / self.processes
        passes = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
        return self.payload * passes[self.operation] * share if self._rings else self.payload

    @property
    def _rings(self) -> bool:
        return self.operation != "exchange"

    def seconds(self, cluster: Cluster) -> float:
        """How long it takes."""
        if not self._rings:
            return cluster.exchange_seconds(self.payload, self.processes)
        passes = 2 if self.operation == "all-reduce" else 1
        return cluster.collective_seconds(self.payload, self.processes, passes)


def traffic(
    weights: Weights,
    options: TrainConfig,
    parallel: Parallel,
    processes: int,
    micro_batches: list[int],
) -> list[Traffic]:
    """The messages of a step. Losses, norms and counts, a few numbers each, are left out.

    Args:
        weights: of the model.
        options: of the run.
        parallel: how weights are shared.
        processes: all.
        micro_batches: tokens of each on a process.
    """
    found: list[Traffic] = []
    if processes == 1:
        return found
    trained = sum(weight.numbers for weight in weights.dense if weight.trains)
    low = BFLOAT if options.mixed_precision == "bf16" else FLOAT
    times = len(micro_batches)
    if parallel == "ddp":
        found.append(Traffic("gradients", "all-reduce", FLOAT * trained, processes, True))
    elif parallel == "fsdp2":
        units = weights.unit_numbers(processes)
        blocks = sum(units.values()) - units[None]
        # Blocks are gathered for the forward and for the backward pass, the rest once for both.
        gathered = low * (2 * blocks + units[None]) * times
        scattered = FLOAT * sum(weights.unit_numbers(processes, trained=True).values())
        found.append(Traffic("weights", "all-gather", gathered, processes, True))
        found.append(Traffic("gradients", "reduce-scatter", scattered, processes, True))
    else:
        scattered = low * trained * times
        found.append(Traffic("gradients", "reduce-scatter", scattered, processes, True))
        found.append(Traffic("weights", "all-gather", low * weights.numbers, processes, False))
    for table in weights.tables:
        shared, layers = table.shared, table.layers
        if shared.processes > 1:
            moved = sum(shared.forward_bytes(t) + shared.backward_bytes(t) for t in micro_batches)
            name = f"reads of {table.name}"
            found.append(Traffic(name, "exchange", layers * moved, shared.processes, False))
        copies = processes // shared.processes
        if copies > 1:
            found.append(
                Traffic(
                    f"reads of {table.name} for its update",
                    "exchange",
                    (copies - 1) * table.waiting_bytes(micro_batches),
                    copies,
                    False,
                )
            )
    return found


def sequence_traffic(sent: Mapping[Operation, int], together: int, parts: float) -> list[Traffic]:
    """The messages of a step between the processes that hold rows together.

    Args:
        sent: by operation, of one micro-batch (see `Footprint`).
        together: processes that hold a row.
        parts: micro-batches of a step.
    """
    return [
        Traffic(f"rows: {_OF_ROWS[operation]}", operation, size * parts, together, False)
        for operation, size in sent.items()
    ]
