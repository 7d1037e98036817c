"""The implementations that are compared, behind one signature; absent ones keep their reason."""

import contextlib
import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gated_delta.problem import INPUTS, Problem
from benchmarks.library import describe
from memlm.cuda import linear_recurrence
from memlm.cuda.dispatch import VARIABLE

Tensors = Mapping[str, Tensor | None]
Function = Callable[[Tensors], tuple[Tensor, Tensor]]
IMPLEMENTATIONS = {"cpu": ("native", "eager"), "cuda": ("cuda", "triton", "eager")}
TRANSFORMERS = "transformers.models.qwen3_next.modeling_qwen3_next"


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation: takes what `Problem.tensors` gives, returns outputs and final states.

    run: over whole sequences, or a string that says why it is absent. step: for a single token
    per row; None: as run.
    """

    name: str
    run: Function | str
    step: Function | str | None = None

    def function(self, tokens: int) -> Function | str:
        """What to call for sequences of this length."""
        return self.step if tokens == 1 and self.step is not None else self.run


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Let `memlm.cuda` take this implementation."""
    with mock.patch.dict(os.environ, {VARIABLE: implementation}):
        yield


def memlm_peer(implementation: str) -> Peer:
    """`memlm.cuda.linear_recurrence`, forced to an implementation or "auto"."""

    def run(tensors: Tensors) -> tuple[Tensor, Tensor]:
        with forced(implementation):
            return linear_recurrence(**tensors, return_state=True, qk_l2norm=True)

    return Peer(f"memlm {implementation}", run)


def memlm_peers(device: str) -> list[Peer]:
    """The choice of dispatch, and what it chooses from on this device; absent ones say why."""
    peers = [memlm_peer("auto")]
    small = Problem(1, 2, 1, 1, 16, 16, device=device).tensors(grad=False)
    for name in IMPLEMENTATIONS[torch.device(device).type]:
        peer = memlm_peer(name)
        try:
            peer.run(small)
        except RuntimeError as refusal:
            peer = dataclasses.replace(peer, run=describe(refusal))
        peers.append(peer)
    return peers


def _external_peer(
    name: str, module: str, function: str, step: str | None = None, packed: bool = True
) -> Peer:
    """A peer whose functions take what all implementations but ours call by the same names."""

    def find(attribute: str) -> Function | str:
        try:
            # Decorators would hand the call on to another installed library.
            call = inspect.unwrap(getattr(importlib.import_module(module), attribute))
        except Exception as failure:  # a broken installation must not end the comparison
            return describe(failure)

        def run(tensors: Tensors) -> tuple[Tensor, Tensor]:
            options = {"initial_state": tensors["initial_state"]}
            if tensors["cu_seqlens"] is not None:
                if not packed:
                    raise ValueError("it keeps no packed sequences apart")
                options["cu_seqlens"] = tensors["cu_seqlens"]
            return call(
                tensors["q"],
                tensors["k"],
                tensors["v"],
                g=tensors["log_decay"],
                beta=tensors["beta"],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                **options,
            )

        return run

    return Peer(name, find(function), find(step) if step else None)


def fla_peer() -> Peer:
    """flash-linear-attention's Triton kernels."""
    functions = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    return _external_peer("fla", "fla.ops.gated_delta_rule", *functions)


def flash_qla_peer() -> Peer:
    """FlashQLA's TileLang kernels, for K = V = 128."""
    return _external_peer("FlashQLA", "flash_qla", "chunk_gated_delta_rule")


def transformers_peer() -> Peer:
    """The plain torch functions of transformers, which ignore boundaries of packed sequences."""
    functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    return _external_peer("transformers", TRANSFORMERS, *functions, packed=False)


def gradients(run: Function, tensors: Tensors, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs, final states and the gradients of all inputs, for these output gradients."""
    o, state = run(tensors)
    leaves = [tensors[name] for name in INPUTS]
    found = torch.autograd.grad((o, state.to(outputs[1].dtype)), leaves, outputs)
    named = {f"d{name}": x for name, x in zip(INPUTS, found, strict=True)}
    return {"o": o.detach(), "state": state.detach(), **named}


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`."""
    difference = (found.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())


def errors(problem: Problem, peers: list[Peer]) -> dict[str, dict[str, float] | str]:
    """Relative RMS errors of each peer against the readable formula in float64, or its failure."""
    tensors, outputs = problem.tensors(), problem.output_gradients()
    exact = {
        name: x.detach().double().requires_grad_() if name in INPUTS else x
        for name, x in tensors.items()
    }
    expected = gradients(memlm_peer("reference").run, exact, tuple(x.double() for x in outputs))
    results: dict[str, dict[str, float] | str] = {}
    for peer in peers:
        if isinstance(peer.run, str):
            results[peer.name] = peer.run
            continue
        try:
            found = gradients(peer.run, tensors, outputs)
            results[peer.name] = {
                name: relative_rms(x, expected[name]) for name, x in found.items()
            }
        except Exception as failure:
            results[peer.name] = describe(failure)
    return results
