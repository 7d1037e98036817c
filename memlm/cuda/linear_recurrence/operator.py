"""The operation as torch sees it: one custom op with a fake and a backward op.

`torch.compile` and autograd know nothing of what happens inside. Every implementation behind it is
a module with ``forward(inputs, chunk_states, save)``, ``backward(inputs, saved, do, dstate)`` and
``saved_like(inputs)``, the shapes of what its forward saves.
"""

import dataclasses
from types import ModuleType

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence import eager
from memlm.cuda.linear_recurrence.inputs import Inputs

IMPLEMENTATIONS: dict[str, ModuleType] = {"eager": eager}
TENSORS = (
    "q",
    "k",
    "v",
    "log_decay",
    "beta",
    "initial_state",
    "cu_seqlens",
    "A_log",
    "dt_bias",
)


def run(implementation: str, inputs: Inputs, chunk_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state and chunk states (empty unless asked for)."""
    save = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in inputs.differentiable().values()
    )
    values = (getattr(inputs, field.name) for field in dataclasses.fields(inputs))
    return _forward(*values, chunk_states, save, implementation)[:3]


@torch.library.custom_op("memlm::linear_recurrence", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    chunk_states: bool,
    save: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    inputs = Inputs(
        q,
        k,
        v,
        log_decay,
        beta,
        initial_state,
        cu_seqlens,
        A_log,
        dt_bias,
        scale,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
    )
    with torch.autocast(q.device.type, enabled=False):
        return IMPLEMENTATIONS[implementation].forward(inputs, chunk_states, save)


@_forward.register_fake
def _(*arguments) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *values, chunk_states, save, implementation = arguments
    inputs = Inputs(*values)
    state = inputs.v.new_empty(inputs.state_shape, dtype=inputs.state_dtype)
    chunks = state.new_empty(inputs.chunk_states_shape if chunk_states else (0,))
    saved = IMPLEMENTATIONS[implementation].saved_like(inputs) if save else []
    return torch.empty_like(inputs.v, memory_format=torch.contiguous_format), state, chunks, saved


@torch.library.custom_op("memlm::linear_recurrence_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    saved: list[Tensor],
    do: Tensor,
    dstate: Tensor,
    implementation: str,
) -> list[Tensor]:
    inputs = Inputs(
        q,
        k,
        v,
        log_decay,
        beta,
        initial_state,
        cu_seqlens,
        A_log,
        dt_bias,
        scale,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
    )
    # A backward pass may itself be called under autocast.
    with torch.autocast(q.device.type, enabled=False):
        found = IMPLEMENTATIONS[implementation].backward(inputs, saved, do, dstate)
    return [
        found[name].to(tensor.dtype).contiguous()
        for name, tensor in inputs.differentiable().items()
    ]


@_backward.register_fake
def _(*arguments) -> list[Tensor]:
    inputs = Inputs(*arguments[: len(dataclasses.fields(Inputs))])
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in inputs.differentiable().values()
    ]


def _setup_context(ctx, inputs, output) -> None:
    *values, _, _, implementation = inputs
    ctx.implementation = implementation
    ctx.options = values[len(TENSORS) :]
    ctx.present = [value is not None for value in values[: len(TENSORS)]]
    tensors = [value for value in values[: len(TENSORS)] if value is not None]
    ctx.save_for_backward(*tensors, *output[3])


def _differentiate(ctx, do: Tensor, dstate: Tensor, _dchunks, _dsaved):
    tensors = list(ctx.saved_tensors)
    values = [tensors.pop(0) if present else None for present in ctx.present]
    inputs = Inputs(*values, *ctx.options)
    gradients = _backward(*values, *ctx.options, tensors, do, dstate, ctx.implementation)
    by_name = dict(zip(inputs.differentiable(), gradients, strict=True))
    nothing = [None] * (len(ctx.options) + 3)
    return (*(by_name.get(name) for name in TENSORS), *nothing)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
