"""Launches of the loss's kernels, with the buffers they write.

The backward pass makes the gradients of the logits twice, once for each of its products: some
tokens for the whole vocabulary, whose product with the weight is then complete, and some of the
vocabulary for all tokens. So every number of a gradient is summed in float32, in the same order
every time, and rounded once. To make them once, one of the two products would have to be summed in
memory over all chunks, in float32 where the gradient has 16 bits: more memory than a hundredth of
the logits, and as many bytes to move as products to gain. Which tiles are negligible is known after
the first time, and these are not made again.

A sum is one program's, in registers, where enough programs are at work; otherwise several programs
have a part of it each, and `sum_kernel` adds the parts (`triton_chunks`).

The vocabulary is taken in its own order.
"""

import dataclasses

import torch
import triton
from torch import Tensor

from memlm.cuda.dispatch import capability, multiprocessors
from memlm.cuda.linear_cross_entropy.triton_chunks import Product
from memlm.cuda.linear_cross_entropy.triton_kernels import (
    forward_kernel,
    gradient_kernel,
    product_kernel,
    sum_kernel,
)

# Least gradient of a logit, before weights, that keeps a tile: that of the paper, an eighth of what
# rounding can change about 1, in both 16-bit types.
LEAST = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: 0.0}
SPLIT = 1024  # entries of the vocabulary, at least, that share a partial sum
GROUP = 16  # token tiles that are worked at together
SHARE = 128  # the part of the logits' bytes that the backward pass takes, beside what is lent
PROGRAMS = 2  # for each multiprocessor, where the memory suffices
SUMMED = 1024  # numbers whose parts a program adds up


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
    if hidden.numel() == 0:
        for output in outputs.values():
            output.zero_()
        return
    tiles = _Tiles.of(hidden, softcap)
    problem = _Problem(hidden, weight, targets, log_sum, factors, softcap, z_loss, tiles)
    live_tiles = torch.empty(problem.grid, dtype=torch.uint8, device=hidden.device)
    # The first one has the memory of the other's result, which is the larger one. The other one has
    # its own last rows, which are then the larger part of what there is.
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
        other_tiles = self.grid[1]
        factors, row_factors = self.factors, self.factors
        if transposed:
            row_tile, other_tile = other_tile, row_tile
            other_tiles = self.grid[0]
            # The largest becomes 1: no number of 16 bits is then too small for its type.
            largest = factors.abs().amax(0, keepdim=True)
            row_factors = torch.where(largest == 0, 1, largest)
            factors = factors / row_factors
        D = output.shape[1]
        itemsize = self.hidden.element_size()
        product = Product(
            row_tile,
            other_tiles,
            triton.cdiv(D, self._columns(row_tile)),
            held=row_tile * other_tiles * other_tile * itemsize,
            sums=4 * row_tile * D,
            row=output.element_size() * D,
            lent=None if unused is None else unused.nbytes,
            own=len(self.hidden) * len(self.weight) * itemsize // SHARE,
            programs=PROGRAMS * multiprocessors(output.device),
        )
        own = torch.empty(product.own_bytes, dtype=torch.uint8, device=output.device)
        flags = live_tiles.T if transposed else live_tiles
        lists = _lists(flags) if known else None
        first = 0
        while first * row_tile < len(output):
            rows = output[first * row_tile :]
            some, parts = product.chunk(len(rows))
            rows, rest = rows[: some * row_tile], rows[some * row_tile :]
            lent = (rest if unused is None else unused).view(-1).view(torch.uint8)
            held, sums = product.places(lent, own, some, parts, len(rows))
            held, sums = held.view(self.hidden.dtype), sums.view(torch.float32)
            self._logit_gradients(held, live_tiles, factors, transposed, first, some, known)
            chunk = slice(first, first + some)
            some_lists = tuple(x[chunk] for x in lists) if known else _lists(flags[chunk])
            some_factors = row_factors if transposed else row_factors[first * row_tile :]
            self._multiply(held, *some_lists, some_factors, rows, transposed, parts, sums)
            first += some

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

    def _columns(self, row_tile: int) -> int:
        """Columns of a program of a product."""
        most = self.tiles.tokens * self.tiles.entries // row_tile
        return min(most, max(16, triton.next_power_of_2(self.hidden.shape[1])))

    def _multiply(
        self,
        gradients: Tensor,
        tile_lists: Tensor,
        tile_counts: Tensor,
        factors: Tensor,
        output: Tensor,
        transposed: bool,
        parts: int,
        sums: Tensor,
    ) -> None:
        """Write output [rows, D], see `product_kernel`.

        sums, float32 [parts * rows * D], are overwritten if there are several parts.
        """
        row_tile, other_tile = self.tiles.tokens, self.tiles.entries
        matrix = self.weight
        if transposed:
            row_tile, other_tile = other_tile, row_tile
            matrix = self.hidden
        D = output.shape[1]
        columns = self._columns(row_tile)
        row_tiles, terms = tile_lists.shape
        product_kernel[(row_tiles * triton.cdiv(D, columns) * parts,)](
            gradients,
            matrix,
            tile_lists,
            tile_counts,
            factors,
            sums if parts > 1 else output,
            len(output),
            len(matrix),
            row_tiles if transposed else terms,
            terms,
            parts,
            D=D,
            TRANSPOSED=transposed,
            BLOCK_R=row_tile,
            TILE_K=other_tile,
            BLOCK_N=columns,
            BLOCK_K=self.tiles.step,
            PRECISION=_precision(self.hidden.dtype),
            **self.tiles.launch,
        )
        if parts > 1:
            sum_kernel[(triton.cdiv(output.numel(), SUMMED),)](
                sums, output, output.numel(), parts, BLOCK=SUMMED
            )


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the ones of each row, and how many they are: int32 [rows, tiles] and [rows]."""
    order = flags.contiguous().argsort(dim=1, descending=True, stable=True).int()
    return order, flags.sum(1, dtype=torch.int32)
