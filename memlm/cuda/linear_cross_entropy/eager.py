"""Chunks of tokens, whose logits are kept until their gradients are made.

A chunk passes over tiles of the vocabulary twice: for the logits and the logarithm of the sum of
their exponentials, and, with the sum known, for the gradient of every logit and its two products.
So each product is made once, and between one and the next a tile does not leave a CPU's cache.
"""

import torch
from torch import Tensor

from memlm.cuda.linear_cross_entropy.inputs import Inputs

backward = None  # forward saves the gradients

# So much of all logits exists at a time: this part, of no more tokens than make products faster,
# but at least this many numbers.
KEPT, TOKENS, NUMBERS = 0.04, 256, 1 << 19
TILE = 1 << 18  # logits of a tile, at most
WORDS = 1024  # of a tile, at most, or an eighth of all


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
    tokens = max(1, min(TOKENS, int(KEPT * N)), min(N, NUMBERS // V))
    width = max(1, min(V, TILE // tokens, max(WORDS, V // 8)))
    buffer = inputs.hidden.new_empty(tokens * (width + (V if keep else width)), **sums)
    counting = (inputs.targets != inputs.ignore_index).nonzero().squeeze(1)
    for rows in counting.split(tokens) if len(counting) else ():
        chunk = _Chunk(inputs, rows, width, buffer, keep)
        log_sum, chosen = chunk.read_logits()
        losses[rows] = log_sum - chosen
        total = log_sum - chosen + inputs.z_loss * log_sum.square()
        totals[rows] = total if chunk.weights is None else chunk.weights * total
        if keep:
            gradient = chunk.differentiate(log_sum, needs_hidden, dweight)
            if dhidden is not None:
                dhidden[rows] = gradient.to(dhidden.dtype)
    gradients = [] if dhidden is None else [dhidden]
    if dweight is not None:
        gradients.append(dweight.to(inputs.weight.dtype))
    return totals.sum(), losses, gradients


class _Chunk:
    """Some tokens, and what a tile of the vocabulary has of each, [tokens, width].

    A tile lies in one piece: rows as long as the vocabulary would share the sets of a cache.
    """

    def __init__(self, inputs: Inputs, rows: Tensor, width: int, buffer: Tensor, keep: bool):
        self.inputs = inputs
        self.hidden = _operand(inputs, inputs.hidden[rows])
        self.targets = inputs.targets[rows]
        self.weights = None if inputs.token_weights is None else inputs.token_weights[rows]
        V, n = inputs.weight.shape[0], len(rows)
        self.logits = buffer[: width * n]
        self.tiles = []
        for first in range(0, V, width):
            columns = slice(first, min(first + width, V))
            begin = (1 + (first if keep else 0) // width) * len(self.logits)
            size = (columns.stop - first) * n
            self.tiles.append((columns, buffer[begin : begin + size].view(n, -1)))
        self.tile_sums: list[Tensor] = []

    def read_logits(self) -> tuple[Tensor, Tensor]:
        """The logarithms of the sums and the targets' logits, both [tokens].

        The tiles get the logits less the logarithms of their own sums.
        """
        softcap = self.inputs.softcap
        chosen = self.logits.new_zeros(len(self.targets))
        for columns, tile in self.tiles:
            logits = self.logits[: tile.numel()].view_as(tile)
            _product(self.hidden, _operand(self.inputs, self.inputs.weight[columns]).T, logits)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            torch.log_softmax(logits, 1, out=tile)
            self.tile_sums.append(logits[:, :1] - tile[:, :1])
            place, inside = self._place(columns)
            chosen += torch.where(inside, logits.gather(1, place)[:, 0], 0)
        return torch.cat(self.tile_sums, 1).logsumexp(1), chosen

    def differentiate(
        self, log_sum: Tensor, needs_hidden: bool, dweight: Tensor | None
    ) -> Tensor | None:
        """The gradient [tokens, D]; adds to that of the weight. The tiles are used up."""
        inputs = self.inputs
        dhidden = log_sum.new_zeros(self.hidden.shape) if needs_hidden else None
        one = log_sum.new_ones(()) if self.weights is None else self.weights
        factor = (one * (1 + 2 * inputs.z_loss * log_sum))[:, None]
        for (columns, tile), tile_sum in zip(self.tiles, self.tile_sums, strict=True):
            slope = None
            if inputs.softcap is not None:  # of c tanh(x / c)
                slope = torch.add(tile, tile_sum, out=self.logits[: tile.numel()].view_as(tile))
                slope.div_(inputs.softcap).square_().neg_().add_(1)
            tile.add_(tile_sum - log_sum[:, None]).exp_()
            if self.weights is not None or inputs.z_loss:
                tile.mul_(factor)
            place, inside = self._place(columns)
            tile.scatter_add_(1, place, torch.where(inside, -one, 0)[:, None])
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
