"""The memory's network at fixed weights: what tokens read, and how far they are off.

``x W`` at depth 1, else ``x + LN(.. gelu(x W1) W2 ..)``, the layer norm with a gain ``1 + g`` if g
is among the weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.neural_memory.state import NORM_EPS, Layers


class Errors(NamedTuple):
    """Of some keys: per layer its inputs and its errors, and the loss."""

    inputs: list[Tensor]
    errors: list[Tensor]
    loss: Tensor


def forward(x: Tensor, weights: Layers) -> Tensor:
    """x through the memory with the same weights for all."""
    gain = _gain(weights)
    layers = weights if gain is None else weights[:-1]
    y = x @ layers[0]
    if len(layers) == 1:
        return y
    for w in layers[1:]:
        y = F.gelu(y) @ w
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    return x + (y if gain is None else y * (1 + gain))


def read_through(
    Q: Tensor,
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    through: Callable[..., tuple[Tensor, Tensor, Tensor]],
    through_gain: Callable[..., tuple[Tensor, Tensor, Tensor]],
    gelu: Callable[[Tensor], Tensor] = F.gelu,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The queries through a memory whose weights change on the way, and every layer's weights and
    momentum after it.

    layers: inputs, errors, weights and momentum of each. through: what a layer does, from its
    queries and the four to what they read, the next weights and momentum; through_gain: the same of
    the gain, whose queries are 1.
    """
    y, *after = through(Q, *layers[0])
    advanced = [after]
    if len(layers) == 1:
        return y, advanced
    gain = None
    for layer in layers[1:]:
        if layer[0].shape[-1] == 1:
            gain, *after = through_gain(torch.ones_like(Q[..., :1]), *layer)
        else:
            y, *after = through(gelu(y), *layer)
        advanced.append(after)
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    return Q + (y if gain is None else y * (1 + gain)), advanced


class GeluWithSlope(torch.autograd.Function):
    """gelu(x) and its derivative ``Phi(x) + x phi(x)``."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        ctx.save_for_backward(x, slope)
        return F.gelu(x), slope

    @staticmethod
    def backward(ctx, dgelu: Tensor, dslope: Tensor) -> Tensor:
        x, slope = ctx.saved_tensors
        square = x * x
        density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        curvature = square.neg_().add_(2).mul_(density)  # gelu'' = phi (2 - x^2)
        return curvature.mul_(dslope).addcmul_(dgelu, slope)


def errors_at(
    anchor: Layers,
    K: Tensor,
    V: Tensor,
    gelu_with_slope: Callable[[Tensor], tuple[Tensor, Tensor]] = GeluWithSlope.apply,
) -> Errors:
    """All layers' inputs and errors at the anchor."""
    gain = _gain(anchor)
    layers = anchor if gain is None else anchor[:-1]
    if len(layers) == 1:
        difference = torch.baddbmm(V, K, layers[0], beta=-1)
        return Errors([K], [2 * difference], difference.square().sum(-1))
    inputs, slopes = [K], []
    Z = K @ layers[0]
    for w in layers[1:]:
        activation, slope = gelu_with_slope(Z)
        inputs.append(activation)
        slopes.append(slope)
        Z = activation @ w
    centred = Z - Z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    normed = centred * inverse_std
    difference = (K - V) + (normed if gain is None else normed * (1 + gain))
    d = 2 * difference
    by_gain = d * normed
    if gain is not None:
        d = d * (1 + gain)
    along = by_gain.mean(-1, keepdim=True) if gain is None else (d * normed).mean(-1, keepdim=True)
    error = (d - d.mean(-1, keepdim=True) - normed * along) * inverse_std
    errors = [error]
    for w, slope in zip(layers[:0:-1], reversed(slopes), strict=True):
        error = (error @ w.mT) * slope
        errors.insert(0, error)
    if gain is not None:
        inputs.append(torch.ones_like(K[..., :1]))
        errors.append(by_gain)
    return Errors(inputs, errors, difference.square().sum(-1))


def clipped(found: Errors, clip: float) -> list[Tensor]:
    """The errors, those of tokens whose gradient is longer than `clip` scaled down to it."""
    scale = clip * square_norm(found).clamp_min(clip**2).rsqrt().unsqueeze(-1)
    return [error * scale for error in found.errors]


def square_norm(found: Errors) -> Tensor:
    """Of every token's gradient over all layers, ``[rows, C]``; outer products make it free."""
    layers = zip(found.inputs, found.errors, strict=True)
    return sum(a.square().sum(-1) * e.square().sum(-1) for a, e in layers)


def _gain(weights: Layers) -> Tensor | None:
    """The gain of the layer norm, kept like a layer with one input."""
    return weights[-1] if len(weights) > 1 and weights[-1].shape[-2] == 1 else None
