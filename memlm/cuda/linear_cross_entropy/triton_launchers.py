"""Launches of the loss's kernels, with the buffers they write.

The backward pass makes the gradients of the logits twice, once for each of its products: some
tokens for the whole vocabulary, whose product with the weight is then complete, and some of the
vocabulary for all tokens. So every number of a gradient is summed in float32 registers by one
program, in the same order every time, and rounded once. To make them once, one of the two products
would have to be summed in memory, in float32 where the gradient has 16 bits: more memory than a
hundredth of the logits, and as many bytes to move as products to gain. Which tiles are negligible
is known after the first time, and these are not made again.

The vocabulary is taken in its own order.
"""

import dataclasses

import torch
import triton
from torch import Tensor

from memlm.cuda.dispatch import capability
from memlm.cuda.linear_cross_entropy.triton_kernels import (
    forward_kernel,
    gradient_kernel,
    product_kernel,
)

# Least gradient of a logit, before weights, that keeps a tile: that of the paper, an eighth of what
# rounding can change about 1, in both 16-bit types.
LEAST = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: 0.0}
SPLIT = 1024  # entries of the vocabulary, at least, that share a partial sum
GROUP = 16  # token tiles that are worked at together
SHARE = 128  # the part of the logits' gradients that is held at a time, where it needs memory


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Tokens and entries of a tile, its channels or products per step, warps and stages."""

    tokens: int
    entries: int
    step: int
    num_warps: int
    num_stages: int

    @staticmethod
    def of(hidden: Tensor, softcap: float | None) -> "_Tiles":
        """What neither spills nor exceeds the shared memory (`benchmarks.compile_all`)."""
        card = capability(hidden.device) // 10
        if hidden.dtype == torch.float32:
            return _Tiles(128 if card in (9, 10) else 64, 128, 32, 8, 3)
        if card == 9:
            narrow = softcap is not None or hidden.shape[1] % 64 != 0
            return _Tiles(128, 128 if narrow else 256, 64, 8, 3)
        return _Tiles(128, 128, 64, 8, 3) if card == 10 else _Tiles(128, 128, 32, 8, 4)

    def step_of(self, D: int) -> int:
        """Channels per step."""
        return min(self.step, max(16, triton.next_power_of_2(D)))

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three parts, unless torch may round it to TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods and log-sum-exps, float32 [N], of hidden [N, D] and weight [V, D].

    All tensors are contiguous. Both results are 0 where the target is `ignore_index`; the first is
    NaN where it is outside the vocabulary.
    """
    tokens, D = hidden.shape
    tiles = _Tiles.of(hidden, softcap)
    per_split = triton.cdiv(SPLIT, tiles.entries)
    splits = triton.cdiv(triton.cdiv(len(weight), tiles.entries), per_split)
    log_sums = torch.empty(splits, tokens, dtype=torch.float32, device=hidden.device)
    chosen = torch.full((tokens,), torch.nan, dtype=torch.float32, device=hidden.device)
    if tokens:
        forward_kernel[(triton.cdiv(tokens, tiles.tokens) * splits,)](
            hidden,
            weight,
            targets,
            log_sums,
            chosen,
            tokens,
            per_split,
            softcap,
            ignore_index,
            D=D,
            V=len(weight),
            BLOCK_M=tiles.tokens,
            BLOCK_V=tiles.entries,
            BLOCK_D=tiles.step_of(D),
            GROUP=GROUP,
            PRECISION=_precision(hidden.dtype),
            **tiles.launch,
        )
    counts = targets != ignore_index
    log_sum = torch.where(counts, log_sums.logsumexp(0), 0)
    return torch.where(counts, log_sum - chosen, 0), log_sum


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    factors: Tensor,
    softcap: float | None,
    z_loss: float,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Write the gradients of hidden [N, D] and weight [V, D], or only one of them.

    All tensors are contiguous. factors: float32 [N], the gradient of each token's loss, 0 where
    there is no target. log_sum is what `forward` returned.
    """
    outputs = {False: dhidden, True: dweight}
    outputs = {transposed: output for transposed, output in outputs.items() if output is not None}
    if len(hidden) == 0:
        for output in outputs.values():
            output.zero_()
        return
    tiles = _Tiles.of(hidden, softcap)
    problem = _Problem(hidden, weight, targets, log_sum, factors, softcap, z_loss, tiles)
    live_tiles = torch.empty(problem.grid, dtype=torch.uint8, device=hidden.device)
    # The first one holds its logits' gradients in the memory of the second one's result. The second
    # one has the more rows, of which a small part is then enough for a card.
    order = sorted(outputs, key=lambda transposed: len(outputs[transposed]))
    for place, transposed in enumerate(order):
        unused = outputs[order[1]] if place < len(order) - 1 else None
        problem.run(transposed, outputs[transposed], live_tiles, place > 0, unused)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The arguments of `backward`, and how they are cut."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    log_sum: Tensor
    factors: Tensor
    softcap: float | None
    z_loss: float
    tiles: _Tiles

    @property
    def grid(self) -> tuple[int, int]:
        """Token tiles and vocabulary tiles."""
        tokens = triton.cdiv(len(self.hidden), self.tiles.tokens)
        return tokens, triton.cdiv(len(self.weight), self.tiles.entries)

    def run(
        self,
        transposed: bool,
        output: Tensor,
        live_tiles: Tensor,
        known: bool,
        unused: Tensor | None,
    ) -> None:
        """Write the gradient of the weight if `transposed`, else that of hidden.

        known: whether live_tiles are given, not found. unused: memory to be overwritten.
        """
        row_tile, other_tile = self.tiles.tokens, self.tiles.entries
        row_tiles, other_tiles = self.grid
        factors, row_factors = self.factors, self.factors
        if transposed:
            row_tile, other_tile = other_tile, row_tile
            row_tiles, other_tiles = other_tiles, row_tiles
            # The largest becomes 1: no number of 16 bits is then too small for its type.
            largest = factors.abs().amax(0, keepdim=True)
            row_factors = torch.where(largest == 0, 1, largest)
            factors = factors / row_factors
        size = row_tile * other_tiles * other_tile
        held = None if unused is None else unused.view(-1).view(self.hidden.dtype)
        if held is None or held.numel() < size:
            held = self.hidden.new_empty(max(1, row_tiles // SHARE) * size)
        most = held.numel() // size
        for first in range(0, row_tiles, most):
            some = min(most, row_tiles - first)
            self._logit_gradients(held, live_tiles, factors, transposed, first, some, known)
            flags = (
                live_tiles[:, first : first + some].T if transposed else live_tiles[first:][:some]
            )
            self._multiply(held, flags.contiguous(), row_factors, output, transposed, first)

    def _logit_gradients(
        self,
        gradients: Tensor,
        live_tiles: Tensor,
        factors: Tensor,
        weighted: bool,
        first: int,
        some: int,
        known: bool,
    ) -> None:
        """Of some token tiles, or of some vocabulary tiles if `weighted`, see `gradient_kernel`."""
        token_tiles, vocabulary_tiles = self.grid
        if weighted:
            vocabulary_tiles = some
        else:
            token_tiles = some
        D = self.hidden.shape[1]
        gradient_kernel[(token_tiles * vocabulary_tiles,)](
            self.hidden,
            self.weight,
            self.targets,
            self.log_sum,
            factors,
            live_tiles,
            gradients,
            len(self.hidden),
            0 if weighted else first,
            first if weighted else 0,
            token_tiles,
            vocabulary_tiles,
            self.softcap,
            self.z_loss,
            LEAST[self.hidden.dtype],
            D=D,
            V=len(self.weight),
            KNOWN=known,
            WEIGHTED=weighted,
            BLOCK_M=self.tiles.tokens,
            BLOCK_V=self.tiles.entries,
            BLOCK_D=self.tiles.step_of(D),
            GROUP=GROUP,
            PRECISION=_precision(self.hidden.dtype),
            **self.tiles.launch,
        )

    def _multiply(
        self,
        gradients: Tensor,
        flags: Tensor,
        factors: Tensor,
        output: Tensor,
        transposed: bool,
        first: int,
    ) -> None:
        """The rows of `output` from row tile `first` on; flags [row tiles, tiles to add up]."""
        row_tile, other_tile = self.tiles.tokens, self.tiles.entries
        matrix = self.weight
        if transposed:
            row_tile, other_tile = other_tile, row_tile
            matrix = self.hidden
        D = output.shape[1]
        block = min(
            self.tiles.tokens * self.tiles.entries // row_tile, max(16, triton.next_power_of_2(D))
        )
        product_kernel[(len(flags) * triton.cdiv(D, block),)](
            gradients,
            matrix,
            flags.argsort(dim=1, descending=True, stable=True).int(),
            flags.sum(1, dtype=torch.int32),
            factors,
            output,
            first * row_tile,
            len(output),
            len(matrix),
            len(flags) if transposed else flags.shape[1],
            flags.shape[1],
            D=D,
            TRANSPOSED=transposed,
            BLOCK_R=row_tile,
            TILE_K=other_tile,
            BLOCK_N=block,
            BLOCK_K=self.tiles.step,
            PRECISION=_precision(self.hidden.dtype),
            **self.tiles.launch,
        )
