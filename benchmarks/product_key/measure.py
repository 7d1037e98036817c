"""Agreement, times and memory of a step: forward, backward, and the update of all parameters."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor, nn

from benchmarks.library import Run, resident_growth
from benchmarks.product_key.problem import Layer, Problem, kernels
from memlm.cuda import row_gradients
from memlm.training.row_optimizer import RowOptimizer

RATE = 1e-3
PEER = "lucidrains, fused Adam"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Ours in one form: the kernels, and what updates the table."""

    kernels: str
    optimizer: str


OURS = {
    "memlm C++, lazy Adam": Contestant("native", "lazy_adam"),
    "memlm C++, row-wise Adagrad": Contestant("native", "rowwise_adagrad"),
    "memlm torch, fused Adam": Contestant("eager", "adam"),
    "memlm torch, lazy Adam": Contestant("eager", "lazy_adam"),
}
NAMES = (PEER, *OURS)
# Largest difference from lucidrains' layer that counts as agreement, by the largest entry of each
# tensor; both are float32.
TOLERANCE = 1e-5


def build(problem: Problem, name: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A layer with the optimizers of its parameters; all start alike."""
    peer = problem.peer()
    if name == PEER:
        return peer, [torch.optim.Adam(peer.parameters(), RATE, fused=True)]
    layer, optimizer = Layer(problem, peer), OURS[name].optimizer
    if optimizer == "adam":
        return layer, [torch.optim.Adam(layer.parameters(), RATE, fused=True)]
    rest = [p for module, p in layer.named_parameters() if module != "values.weight"]
    rows = RowOptimizer([layer.values], RATE, optimizer)
    return layer, [rows, torch.optim.Adam(rest, RATE, fused=True)]


def step_of(problem: Problem, name: str) -> Run:
    """What to time: a whole step."""
    layer, optimizers = build(problem, name)
    x, dout = problem.inputs()

    def step(_: int) -> None:
        layer(x).backward(dout)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None

    if name == PEER:
        return step

    def forced(number: int) -> None:
        with kernels(OURS[name].kernels):
            step(number)

    return forced


def outcome(problem: Problem, name: str) -> dict[str, Tensor]:
    """Outputs and gradients, in our layout of the parameters."""
    layer, _ = build(problem, name)
    x, dout = problem.inputs()
    with kernels(OURS[name].kernels if name in OURS else "auto"):
        out = layer(x)
        out.backward(dout)
        queries, keys = layer.to_queries.weight.grad, layer.keys.grad
        if name == PEER:
            rows = queries.view(2, problem.heads, problem.d // 2, problem.d)
            queries, keys = rows.transpose(0, 1).flatten(0, 2), keys.permute(0, 2, 1, 3)
        table = layer.values.weight.grad
        if table is None:
            rows, gradient = row_gradients(layer.values.pending.take(), problem.n**2)
            table = torch.zeros(problem.n**2, problem.d).index_copy_(0, rows, gradient)
    return {
        "output": out.detach(),
        "input gradient": x.grad,
        "query gradient": queries,
        "key gradient": keys,
        "table gradient": table,
    }


def differences(problem: Problem, name: str) -> dict[str, float]:
    """How far ours is from lucidrains': largest differences over the largest entries."""
    ours, peer = outcome(problem, name), outcome(problem, PEER)
    return {
        key: float((found - peer[key]).abs().max() / peer[key].abs().max())
        for key, found in ours.items()
    }


def agrees(found: dict[str, float]) -> bool:
    """Whether what `differences` found is within TOLERANCE; NaN is not."""
    return all(difference <= TOLERANCE for difference in found.values())


def peak_memory(problem: Problem, name: str) -> int:
    """Bytes of a step at its peak, above the layer, its optimizers' state and the inputs.

    Measured in a process of its own, after a step that makes the state. Linux only.
    """
    return in_another_process(peak_growth, problem, name)


def in_another_process(function: Callable[..., int], *arguments: object) -> int:
    """The result of a call in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def peak_growth(problem: Problem, name: str) -> int:
    """`peak_memory` in this process."""
    torch.set_num_threads(1)
    step = step_of(problem, name)
    step(0)
    return resident_growth(step)


def resident_in_all(problem: Problem, name: str) -> int:
    """Bytes that layer, optimizers and a step take at their peak, in this process."""
    torch.set_num_threads(1)
    step_of(Problem(32, T=64), name)(0)  # what libraries load at their first use

    def everything(_: int) -> None:
        step = step_of(problem, name)
        step(0)
        step(1)

    return resident_growth(everything)
