"""Agreement, times and memory of titans-pytorch's memory and ours."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor, nn

from benchmarks.library import Run, resident_growth
from benchmarks.titans.closed_form import ClosedFormMemory
from benchmarks.titans.problem import Problem

OURS, PEER = "memlm", "titans-pytorch"
# Largest difference from titans-pytorch that counts as agreement, by the largest entry of each
# tensor; both are float32.
TOLERANCE = {"output": 1e-5, "input gradient": 1e-5, "parameter gradients": 1e-4}


def memories(problem: Problem) -> dict[str, nn.Module]:
    """Both implementations, with the same parameters."""
    peer = problem.peer()
    return {PEER: peer, OURS: ClosedFormMemory(peer)}


def gradients(
    memory: nn.Module, names: tuple[str, ...], x: Tensor, output_gradients: Tensor
) -> dict[str, Tensor]:
    """Outputs, and the gradients of x and of the parameters with these names."""
    o, _ = memory(x)
    parameters = dict(memory.named_parameters())
    found = torch.autograd.grad(o, [x, *(parameters[name] for name in names)], output_gradients)
    return {"output": o.detach(), **dict(zip(("input", *names), found, strict=True))}


def trained_parameters(problem: Problem) -> tuple[str, ...]:
    """Names of the parameters that the function depends on: those that ours copies."""
    return tuple(name for name, _ in memories(problem)[OURS].named_parameters())


def differences(problem: Problem) -> dict[str, float | str]:
    """How far ours is from titans-pytorch: largest differences over the largest entries."""
    names = trained_parameters(problem)
    found = {
        name: gradients(memory, names, problem.inputs(), problem.output_gradients())
        for name, memory in memories(problem).items()
    }
    off = {
        name: float((found[OURS][name] - x).abs().max() / x.abs().max())
        for name, x in found[PEER].items()
    }
    worst = max(names, key=off.__getitem__)
    return {
        "largest output": float(found[PEER]["output"].abs().max()),
        "output": off["output"],
        "input gradient": off["input"],
        "parameter gradients": off[worst],
        "worst parameter": worst,
    }


def agrees(found: dict[str, float | str]) -> bool:
    """Whether what `differences` found is within TOLERANCE; NaN is not."""
    return all(found[name] <= bound for name, bound in TOLERANCE.items())


def run_of(problem: Problem, name: str, backward: bool = True) -> Run:
    """What to time: forward and backward of one implementation, or forward without graph."""
    memory = memories(problem)[name]
    names = trained_parameters(problem)
    x, output_gradients = problem.inputs(), problem.output_gradients()
    if backward:
        return lambda _: gradients(memory, names, x, output_gradients)

    def forward(_: int) -> object:
        with torch.no_grad():
            return memory(x)

    return forward


def peak_memory(problem: Problem, name: str) -> int:
    """Bytes of a forward and backward pass at its peak, above the model and its inputs.

    Measured in a process of its own, after a pass over two chunks that loads what libraries load
    at their first use. Linux only.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak_growth, problem, name).result()


def _peak_growth(problem: Problem, name: str) -> int:
    torch.set_num_threads(1)
    run_of(dataclasses.replace(problem, T=2 * problem.chunk), name)(0)
    return resident_growth(run_of(problem, name))


def feed(memory: Callable, x: Tensor, lengths: list[int], state: object = None) -> Tensor:
    """Outputs for the tokens of x in calls of these lengths, each with the state of the last."""
    outputs = []
    for piece in x.split(lengths, 1):
        o, state = memory(piece, state=state)
        outputs.append(o)
    return torch.cat(outputs, 1)
