"""The operation as torch sees it: one custom op with a fake and a backward op.

Every implementation behind it is a module that knows neither autograd nor autocast:

- ``forward(inputs, needs_hidden, needs_weight)`` returns the loss, the losses [N] and a list of new
  tensors for the backward pass, which is empty where no gradient is needed;
- ``saved_like(inputs, needs_hidden, needs_weight)`` returns empty tensors like those of the list;
- ``backward(inputs, saved, grad, needs_hidden, needs_weight)`` returns the gradients that are
  needed, that of hidden first; `grad` is that of the loss, a scalar of `sum_dtype`. It is None
  where the list already has these gradients, for a `grad` of 1: the loss is one number, so they can
  be made along with it. They are then scaled in place, and only one backward pass is possible.

Gradients have the shape and the type of hidden and weight.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.cuda.linear_cross_entropy.inputs import Inputs
from memlm.cuda.linear_cross_entropy.reference import linear_cross_entropy_reference

MODULES = {
    "eager": "memlm.cuda.linear_cross_entropy.eager",
    "triton": "memlm.cuda.linear_cross_entropy.triton_implementation",
}
PARTS = 16  # that a gradient of low precision is scaled in, each in float32


def refusals(inputs: Inputs) -> dict[str, str | None]:
    """The implementations there are, each with why it cannot take these inputs, or None."""
    wide = inputs.dtype == torch.float64
    triton = "the inputs are float64, the kernels sum in float32" if wide else None
    return {"reference": None, "eager": None, "triton": triton}


def run(implementation: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss, with gradients, and the losses [N], without."""
    if implementation == "reference":
        if not torch.compiler.is_compiling():
            inputs.check_targets()
        return linear_cross_entropy_reference(inputs)
    grad = torch.is_grad_enabled()
    loss, losses, _ = _forward(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.token_weights,
        inputs.ignore_index,
        inputs.softcap,
        inputs.z_loss,
        inputs.dtype,
        grad and inputs.hidden.requires_grad,
        grad and inputs.weight.requires_grad,
        implementation,
    )
    return loss, losses.detach()


def _module(implementation: str) -> ModuleType:
    # On first use: where triton is missing, its kernels cannot even be imported.
    return importlib.import_module(MODULES[implementation])


@torch.library.custom_op("memlm::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs = Inputs(hidden, weight, targets, token_weights, ignore_index, softcap, z_loss, dtype)
    inputs.check_targets()
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        return _module(implementation).forward(inputs, needs_hidden, needs_weight)


@_forward.register_fake
def _(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    *values, needs_hidden, needs_weight, implementation = arguments
    inputs = Inputs(*values)
    losses = inputs.hidden.new_empty(inputs.sizes[0], dtype=inputs.sum_dtype)
    saved = _module(implementation).saved_like(inputs, needs_hidden, needs_weight)
    return losses.new_empty(()), losses, saved


@torch.library.custom_op("memlm::linear_cross_entropy_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    dtype: torch.dtype,
    saved: list[Tensor],
    grad: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    implementation: str,
) -> list[Tensor]:
    inputs = Inputs(hidden, weight, targets, token_weights, ignore_index, softcap, z_loss, dtype)
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        return _module(implementation).backward(inputs, saved, grad, needs_hidden, needs_weight)


@_backward.register_fake
def _(*arguments) -> list[Tensor]:
    *values, _saved, _grad, needs_hidden, needs_weight, _ = arguments
    return Inputs(*values).gradients_like(needs_hidden, needs_weight)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, token_weights, *ctx.options = inputs
    tensors = [hidden, weight, targets, token_weights]
    if _module(ctx.options[-1]).backward is None:
        tensors = [None] * len(tensors)  # so that the outputs of the last layer can be freed
    ctx.save_for_backward(*tensors, *output[2])
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    *options, needs_hidden, needs_weight, implementation = ctx.options
    nothing = [None] * 9
    if grad is None:
        return None, None, *nothing
    tensors, saved = _saved_tensors(ctx)
    if tensors[0] is None:
        # Detached: as outputs of the op they would seem to have gradients of their own.
        gradients = [_scaled(gradient.detach(), grad) for gradient in saved]
    else:
        gradients = _backward(
            *tensors, *options, saved, grad, needs_hidden, needs_weight, implementation
        )
    dhidden = gradients.pop(0) if needs_hidden else None
    dweight = gradients.pop(0) if needs_weight else None
    return dhidden, dweight, *nothing


def _saved_tensors(ctx) -> tuple[list[Tensor | None], list[Tensor]]:
    try:
        found = ctx.saved_tensors  # once: a checkpoint recomputes them
    except RuntimeError as error:
        raise RuntimeError(
            "linear_cross_entropy: its gradients were given away in a backward pass before; call "
            f"it again for another one ({error})"
        ) from error
    return list(found[:4]), list(found[4:])


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times the factor, in the same memory."""
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    # Rounded to low precision, the factor would change all entries by the same part.
    for part in gradient.chunk(PARTS):
        part.copy_(part.to(factor.dtype).mul_(factor))
    return gradient


_forward.register_autograd(_differentiate, setup_context=_setup_context)
