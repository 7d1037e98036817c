"""The operation as torch sees it: one custom op with a fake and a backward op.

`torch.compile` and autograd know nothing of what happens inside. Every implementation behind it is
a module with ``forward(inputs, chunk_states, save)``, ``backward(inputs, saved, do, dstate)`` and
``saved_like(inputs)``, the shapes of what its forward saves.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from memlm.cuda.dispatch import interpreting
from memlm.cuda.linear_recurrence import native
from memlm.cuda.linear_recurrence.inputs import Inputs

MODULES = {
    "eager": "memlm.cuda.linear_recurrence.eager",
    "native": "memlm.cuda.linear_recurrence.native",
    "triton": "memlm.cuda.linear_recurrence.triton_implementation",
}
LARGEST = 256  # channels of a key or a value that the Triton kernels take
LOW_PRECISION = (torch.bfloat16, torch.float16)
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


def refusals(inputs: Inputs) -> dict[str, str | None]:
    """The implementations there are, each with why it cannot take these inputs, or None."""
    _, _, _, _, K, V = inputs.sizes
    triton = None
    if inputs.v.dtype not in LOW_PRECISION and not interpreting():
        triton = f"{inputs.v.dtype} values are left to eager, the kernels take bfloat16 and float16"
    elif max(K, V) > LARGEST:
        triton = f"K = {K}, V = {V}: the kernels take up to {LARGEST} channels"
    return {
        "reference": None,
        "eager": None,
        "native": native.refusal(inputs),
        "triton": triton,
    }


@contextlib.contextmanager
def _as_given(x: Tensor) -> Iterator[None]:
    """In the precision and on the device of the tensors, whatever the caller has set."""
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def _module(implementation: str) -> ModuleType:
    # On first use: where triton is missing, its kernels cannot even be imported.
    return importlib.import_module(MODULES[implementation])


def run(implementation: str, inputs: Inputs, chunk_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state and chunk states (empty unless asked for)."""
    save = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in inputs.differentiable().values()
    )
    untraced = type(inputs.q) is Tensor and not torch.compiler.is_compiling()
    if not save and inputs.q.shape[1] == 1 and untraced:
        # A token in decoding takes about as long as torch's way to a custom op and back.
        if implementation == "native":  # which knows no autocast and no other device
            return native.forward(inputs, chunk_states, save)[:3]
        with _as_given(inputs.q):
            return _module(implementation).forward(inputs, chunk_states, save)[:3]
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
    with _as_given(q):
        return _module(implementation).forward(inputs, chunk_states, save)


@_forward.register_fake
def _(*arguments) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *values, chunk_states, save, implementation = arguments
    inputs = Inputs(*values)
    state = inputs.v.new_empty(inputs.state_shape, dtype=inputs.state_dtype)
    chunks = state.new_empty(inputs.chunk_states_shape if chunk_states else (0,))
    saved = _module(implementation).saved_like(inputs) if save else []
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
    with _as_given(q):
        found = _module(implementation).backward(inputs, saved, do, dstate)
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
    # Zeros for the gradients of all that is saved would take longer than some backward passes.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, dstate: Tensor | None, _dchunks, _dsaved):
    tensors = list(ctx.saved_tensors)
    values = [tensors.pop(0) if present else None for present in ctx.present]
    inputs = Inputs(*values, *ctx.options)
    if do is None:
        do = torch.zeros_like(inputs.v)
    if dstate is None:
        dstate = inputs.v.new_zeros(inputs.state_shape, dtype=inputs.state_dtype)
    gradients = _backward(*values, *ctx.options, tensors, do, dstate, ctx.implementation)
    by_name = dict(zip(inputs.differentiable(), gradients, strict=True))
    nothing = [None] * (len(ctx.options) + 3)
    return (*(by_name.get(name) for name in TENSORS), *nothing)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("memlm::linear_recurrence_step", mutates_args=("state",))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    implementation: str,
) -> Tensor:
    """One token per row, the state overwritten: see `linear_recurrence_step`."""
    inputs = Inputs(
        q,
        k,
        v,
        log_decay,
        beta,
        state,
        None,
        A_log,
        dt_bias,
        scale,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
    )
    module = _module(implementation)
    with _as_given(q):
        if implementation != "eager":
            return module.step_in_place(inputs)
        o, new_state, *_ = module.forward(inputs, False, False)
    state.copy_(new_state)
    return o


@step.register_fake
def _(q, k, v, *_) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
