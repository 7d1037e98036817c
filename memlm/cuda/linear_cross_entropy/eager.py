"""Chunks of tokens, whose logits are kept until their gradients are made.

A chunk passes over tiles of the vocabulary twice: for the logits and the logarithm of the sum of
their exponentials, and, with the sum known, for the gradient of every logit and its two products.
So each product is made once, and between one and the next a tile does not leave a CPU's cache.
"""

import torch
from torch import Tensor

from memlm.cuda.linear_cross_entropy.inputs import Inputs

backward = None  # forward saves the gradients

KEPT = 0.04  # of all logits that exist at a time
FEWEST, MOST = 16, 256  # tokens of a chunk: with more, products are no faster
TILE = 1 << 18  # logits of a tile, at most


def saved_like(inputs: Inputs, needs_hidden: bool, needs_weight: bool) -> list[Tensor]:
    """Empty tensors like what `forward` saves."""
    return inputs.gradients_like(needs_hidden, needs_weight)


def forward(
    inputs: Inputs, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the losses [N] and the gradients that are needed."""
    N, V, D = inputs.sizes
    sums = {"dtype": inputs.sum_dtype}
    losses, totals = inputs.hidden.new_zeros(2, N, **sums)
    dhidden = inputs.hidden.new_zeros(N, D) if needs_hidden else None
    dweight = inputs.hidden.new_zeros(V, D, **sums) if needs_weight else None
    keep = needs_hidden or needs_weight
    tokens = min(MOST, max(FEWEST, int(KEPT * N)))
    width = min(V, TILE // tokens)
    buffer = inputs.hidden.new_empty(tokens * (V if keep else width), **sums)
    counting = (inputs.targets != inputs.ignore_index).nonzero().squeeze(1)
    for rows in counting.split(tokens) if len(counting) else ():
        chunk = _Chunk(inputs, rows, width, buffer, keep)
        log_sum, chosen = chunk.read_logits()
        losses[rows] = log_sum - chosen
        totals[rows] = chunk.weights * (log_sum - chosen + inputs.z_loss * log_sum.square())
        if keep:
            gradient = chunk.differentiate(log_sum, needs_hidden, dweight)
            if dhidden is not None:
                dhidden[rows] = gradient.to(dhidden.dtype)
    gradients = [] if dhidden is None else [dhidden]
    if dweight is not None:
        gradients.append(dweight.to(inputs.weight.dtype))
    return totals.sum(), losses, gradients


class _Chunk:
    """Some tokens, and their logits in tiles of the vocabulary, each [tokens, width].

    A tile lies in one piece: rows as long as the vocabulary would share the sets of a cache.
    """

    def __init__(self, inputs: Inputs, rows: Tensor, width: int, buffer: Tensor, keep: bool):
        self.inputs = inputs
        self.hidden = _operand(inputs, inputs.hidden[rows])
        self.targets = inputs.targets[rows]
        weights = inputs.token_weights
        self.weights = buffer.new_ones(()) if weights is None else weights[rows]
        V, n = inputs.weight.shape[0], len(rows)
        self.tiles = []
        for first in range(0, V, width):
            columns = slice(first, min(first + width, V))
            begin, size = (first if keep else 0) * n, (columns.stop - first) * n
            self.tiles.append((columns, buffer[begin : begin + size].view(n, -1)))

    def read_logits(self) -> tuple[Tensor, Tensor]:
        """Fill the tiles; the logarithms of the sums and the targets' logits, both [tokens]."""
        softcap = self.inputs.softcap
        log_sums, chosen = [], torch.zeros_like(self.tiles[0][1][:, 0])
        for columns, tile in self.tiles:
            _product(self.hidden, _operand(self.inputs, self.inputs.weight[columns]).T, tile)
            if softcap is not None:
                tile.div_(softcap).tanh_().mul_(softcap)
            log_sums.append(tile.logsumexp(1))
            place, inside = self._place(columns)
            chosen += torch.where(inside, tile.gather(1, place)[:, 0], 0)
        return torch.stack(log_sums).logsumexp(0), chosen

    def differentiate(
        self, log_sum: Tensor, needs_hidden: bool, dweight: Tensor | None
    ) -> Tensor | None:
        """The gradient [tokens, D]; adds to that of the weight. The tiles are used up."""
        inputs = self.inputs
        dhidden = log_sum.new_zeros(self.hidden.shape) if needs_hidden else None
        factor = (self.weights * (1 + 2 * inputs.z_loss * log_sum))[:, None]
        for columns, tile in self.tiles:
            slope = None
            if inputs.softcap is not None:  # of c tanh(x / c)
                slope = tile.div(inputs.softcap).square_().neg_().add_(1)
            tile.sub_(log_sum[:, None]).exp_().mul_(factor)
            place, inside = self._place(columns)
            tile.scatter_add_(1, place, torch.where(inside, -self.weights, 0)[:, None])
            if slope is not None:
                tile.mul_(slope)
            gradient = tile.to(self.hidden.dtype)
            if dhidden is not None:
                _add_product(dhidden, gradient, _operand(inputs, inputs.weight[columns]))
            if dweight is not None:
                _add_product(dweight[columns], gradient.T, self.hidden)
        return dhidden

    def _place(self, columns: slice) -> tuple[Tensor, Tensor]:
        """The column [tokens, 1] of every target in a tile, and whether [tokens] it is in it."""
        place = self.targets - columns.start
        width = columns.stop - columns.start
        return place.clamp(0, width - 1)[:, None], (place >= 0) & (place < width)


def _operand(inputs: Inputs, x: Tensor) -> Tensor:
    """As products take it: a CPU multiplies float32 many times faster than shorter numbers."""
    x = x.to(inputs.dtype)
    return x.to(inputs.sum_dtype) if x.device.type == "cpu" else x


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
