"""The operation as torch sees it: one custom op with a fake and a backward op.

Every implementation behind it is a module with ``forward(inputs)``, which returns the parts and
the new tails, and ``backward(inputs, dparts, dnew_tail)``, which returns the gradients of x,
weight and tail. Nothing but the inputs is kept for the backward pass: what lies between is
computed again.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.cuda.short_convolution.inputs import Inputs, Part

MODULES = {
    "eager": "memlm.cuda.short_convolution.eager",
    "triton": "memlm.cuda.short_convolution.triton_kernels",
}


def run(implementation: str, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """The parts [B, T, heads, head_dim] and the new tails."""
    untraced = type(inputs.x) is Tensor and not torch.compiler.is_compiling()
    if untraced and not torch.is_grad_enabled():
        return _module(implementation).forward(inputs)
    heads, head_dims, normalize = (list(column) for column in zip(*inputs.parts, strict=True))
    arguments = (
        inputs.x,
        inputs.weight,
        inputs.tail,
        inputs.cu_seqlens,
        inputs.silu,
        heads,
        head_dims,
        normalize,
        implementation,
    )
    if untraced:
        *parts, new_tail = _Untraced.apply(*arguments)
        return parts, new_tail
    return _forward(*arguments)


def _module(implementation: str) -> ModuleType:
    # On first use: where triton is missing, its kernels cannot even be imported.
    return importlib.import_module(MODULES[implementation])


def _gather(
    x: Tensor,
    weight: Tensor,
    tail: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
    heads: list[int],
    head_dims: list[int],
    normalize: list[bool],
) -> Inputs:
    parts = tuple(map(Part, heads, head_dims, normalize))
    return Inputs(x, weight, tail, cu_seqlens, silu, parts)


@torch.library.custom_op("memlm::short_convolution", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    tail: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
    heads: list[int],
    head_dims: list[int],
    normalize: list[bool],
    implementation: str,
) -> tuple[list[Tensor], Tensor]:
    inputs = _gather(x, weight, tail, cu_seqlens, silu, heads, head_dims, normalize)
    return _module(implementation).forward(inputs)


@_forward.register_fake
def _(*arguments) -> tuple[list[Tensor], Tensor]:
    inputs = _gather(*arguments[:-1])
    parts = [inputs.x.new_empty(shape) for shape in inputs.part_shapes()]
    return parts, torch.empty_like(inputs.tail, memory_format=torch.contiguous_format)


@torch.library.custom_op("memlm::short_convolution_backward", mutates_args=())
def _backward(
    x: Tensor,
    weight: Tensor,
    tail: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
    heads: list[int],
    head_dims: list[int],
    normalize: list[bool],
    dparts: list[Tensor],
    dnew_tail: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _gather(x, weight, tail, cu_seqlens, silu, heads, head_dims, normalize)
    return _module(implementation).backward(inputs, dparts, dnew_tail)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, tail: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (x, weight, tail)
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, tail, cu_seqlens, *ctx.options = inputs
    ctx.packed = cu_seqlens is not None
    ctx.save_for_backward(x, weight, tail, *([cu_seqlens] if ctx.packed else []))


def _differentiate(ctx, dparts: list[Tensor], dnew_tail: Tensor):
    tensors = ctx.saved_tensors if ctx.packed else (*ctx.saved_tensors, None)
    *options, implementation = ctx.options
    gradients = _backward(*tensors, *options, dparts, dnew_tail, implementation)
    return (*gradients, *[None] * (1 + len(ctx.options)))


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Untraced(torch.autograd.Function):
    """The op where nobody traces the call: its dispatch takes longer than a token's work."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        *values, implementation = arguments
        parts, new_tail = _module(implementation).forward(_gather(*values))
        _setup_context(ctx, arguments, (parts, new_tail))
        return (*parts, new_tail)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        *dparts, dnew_tail = gradients
        tensors = ctx.saved_tensors if ctx.packed else (*ctx.saved_tensors, None)
        *options, implementation = ctx.options
        inputs = _gather(*tensors, *options)
        found = _module(implementation).backward(inputs, dparts, dnew_tail)
        return (*found, *[None] * (1 + len(ctx.options)))
