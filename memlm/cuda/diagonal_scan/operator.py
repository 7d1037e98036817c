"""The operation as torch sees it: one custom op with a fake and a backward op.

Every implementation behind it is a module with ``forward(inputs)``, which returns h and the final
states, and ``backward(inputs, h, dh, dstate)``, which returns the gradients of a, b and the initial
states. Nothing is kept for the backward pass but h.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.cuda.diagonal_scan.inputs import Inputs

MODULES = {
    "eager": "memlm.cuda.diagonal_scan.eager",
    "triton": "memlm.cuda.diagonal_scan.triton_kernels",
}
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refusals(inputs: Inputs) -> dict[str, str | None]:
    """The implementations there are, each with why it cannot take these inputs, or None."""
    triton = None
    if not {inputs.a.dtype, inputs.b.dtype} <= set(TRITON_DTYPES):
        triton = f"a is {inputs.a.dtype}, b is {inputs.b.dtype}"
    return {"reference": None, "eager": None, "triton": triton}


def run(implementation: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final states [N, D]."""
    arguments = (inputs.a, inputs.b, inputs.initial_state, inputs.cu_seqlens, implementation)
    # A dispatch mode, such as selective checkpointing, is to see one op.
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if type(inputs.b) is Tensor and not watched:
        if not torch.is_grad_enabled():
            return _module(implementation).forward(inputs)
        return _Untraced.apply(*arguments)
    return _forward(*arguments)


def _module(implementation: str) -> ModuleType:
    # On first use: where triton is missing, its kernels cannot even be imported.
    return importlib.import_module(MODULES[implementation])


@torch.library.custom_op("memlm::diagonal_scan", mutates_args=())
def _forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return _module(implementation).forward(Inputs(a, b, initial_state, cu_seqlens))


@_forward.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor, *_) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (b, initial_state)
    )


@torch.library.custom_op("memlm::diagonal_scan_backward", mutates_args=())
def _backward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dstate: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(a, b, initial_state, cu_seqlens)
    return _module(implementation).backward(inputs, h, dh, dstate)


@_backward.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (a, b, initial_state)
    )


def _setup_context(ctx, inputs, output) -> None:
    a, b, initial_state, cu_seqlens, ctx.implementation = inputs
    ctx.packed = cu_seqlens is not None
    packed = [cu_seqlens] if ctx.packed else []
    ctx.save_for_backward(a, b, initial_state, output[0], *packed)


def _saved(ctx) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    a, b, initial_state, h, *packed = ctx.saved_tensors
    return a, b, initial_state, packed[0] if packed else None, h


def _differentiate(ctx, dh: Tensor, dstate: Tensor):
    return (*_backward(*_saved(ctx), dh, dstate, ctx.implementation), None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Untraced(torch.autograd.Function):
    """The op where nobody traces the call: its dispatch takes longer than a token's work."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor]:
        *tensors, implementation = arguments
        outputs = _module(implementation).forward(Inputs(*tensors))
        _setup_context(ctx, arguments, outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor, dstate: Tensor):
        *tensors, h = _saved(ctx)
        found = _module(ctx.implementation).backward(Inputs(*tensors), h, dh, dstate)
        return (*found, None, None)
