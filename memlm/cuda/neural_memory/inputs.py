"""The options of the operation, and the checks of its arguments."""

import dataclasses
import itertools

import torch
from torch import Tensor

from memlm.cuda.boundaries import check_boundaries
from memlm.cuda.dispatch import interpreting
from memlm.cuda.neural_memory.state import NeuralMemoryState
from memlm.errors import nearest

# Tokens from which on a chunk whose weights change at its end only is a tile by itself: fewer
# products, more passes over the weights.
SHORTEST_WHOLE_CHUNK = 16
READS = ("inclusive", "chunk_start", "chunk_gates")
MAX_DEPTH = 4
# By depth, the most channels of a head that the kernels take; with 128 at depth 2 they spill 56
# bytes per thread, in tiles of 16 tokens too.
KERNEL_WIDTHS = {1: 256, 2: 64}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What belongs to the function and not to its inputs: see `neural_memory`.

    Attributes:
        refresh: tokens between refreshes of the anchor, 0 = never.
    """

    chunk_size: int
    read: str
    refresh: int
    exact: bool
    clip: float | None

    @classmethod
    def build(
        cls, chunk_size: int, read: str, refresh: str | int, exact: bool, clip: float | None
    ) -> "Rule":
        """The checked options.

        Raises:
            ValueError: an unknown option or a combination without meaning.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
        if read not in READS:
            raise ValueError(
                f"read is {read!r}, not one of {', '.join(READS)}{nearest(read, READS)}"
            )
        if refresh == "chunk":
            period = chunk_size
        elif refresh == "never":
            period = 0
        elif isinstance(refresh, int) and refresh > 0 and refresh % chunk_size == 0:
            period = refresh
        else:
            raise ValueError(
                f"refresh is {refresh!r}: it must be 'chunk', 'never' or a multiple of the chunk "
                f"size, {chunk_size}"
            )
        if read == "chunk_start" and period != chunk_size:
            raise ValueError("read='chunk_start' reads the anchor: it needs refresh='chunk'")
        if exact and (read != "inclusive" or clip is not None or refresh != "chunk"):
            raise ValueError(
                "exact takes every gradient at the weights of the token before: it needs "
                "read='inclusive', refresh='chunk' and no clip"
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: it must be positive")
        return cls(chunk_size, read, period, exact, clip)

    @property
    def whole_chunks(self) -> bool:
        """Whether a chunk is a tile by itself."""
        return self.read == "chunk_gates" and self.chunk_size >= SHORTEST_WHOLE_CHUNK

    @property
    def cycle(self) -> int:
        """The offset of a state counts tokens modulo this."""
        return self.refresh or self.chunk_size

    def offset_after(self, offset: Tensor, lengths: Tensor) -> Tensor:
        """Offsets of the states after `lengths` more tokens."""
        return offset if self.exact else (offset + lengths) % self.cycle


def check_shapes(
    tokens: dict[str, Tensor], state: NeuralMemoryState, rule: Rule, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError for shapes that do not fit together."""
    q = tokens["q"]
    B, T, H, D = q.shape
    for name, x in tokens.items():
        expected = q.shape if name in ("k", "v") else q.shape[: x.ndim if name == "q" else 3]
        if x.shape != expected:
            raise ValueError(f"{name} is {tuple(x.shape)}: expected {tuple(expected)}")
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, B, T)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    depth = state.depth
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"the state has {depth} layers: a memory has 1 to {MAX_DEPTH}")
    if rule.exact and depth > 1:
        raise ValueError(f"exact is for the linear memory, the state has {depth} layers")
    widths = [D, *(w.shape[-1] for w in state.weights[: depth - 1]), D]
    if min(widths[1:depth], default=2) < 2:
        raise ValueError(f"a hidden layer has {min(widths[1:depth])} channels: it needs 2 or more")
    expected = [(N, H, *pair) for pair in itertools.pairwise(widths)]
    if len(state.weights) > depth and depth > 1:
        expected.append((N, H, D))
    parts = {"weights": state.weights, "momentum": state.momentum}
    if not (rule.exact and not state.anchor):
        parts["anchor"] = state.anchor
    for name, part in parts.items():
        if [tuple(w.shape) for w in part] != expected:
            raise ValueError(
                f"the state's {name} has layers {[tuple(w.shape) for w in part]}: expected "
                f"{expected}"
            )
    if rule.exact and state.anchor:
        raise ValueError("exact has no anchor: the state's anchor must be empty, ()")
    if tuple(state.offset.shape) != (N,):
        raise ValueError(f"the state's offset is {tuple(state.offset.shape)}: expected {(N,)}")


def kernel_refusal(v: Tensor, state: NeuralMemoryState, rule: Rule, statistics: bool) -> str | None:
    """Why the Triton kernels cannot take these arguments; None where they can."""
    depth, D = state.depth, v.shape[-1]
    if depth not in KERNEL_WIDTHS:
        return f"the memory has {depth} layers, the kernels take 1 or 2"
    if len(state.weights) > depth:
        return "the memory has a gain"
    if rule.clip is not None or statistics:
        return "clipping and statistics are left to eager"
    if rule.read == "chunk_start":
        return "read='chunk_start' is left to eager"
    if v.dtype not in (torch.bfloat16, torch.float16) and not interpreting():
        return f"{v.dtype} values are left to eager, the kernels take bfloat16 and float16"
    if KERNEL_WIDTHS[depth] < D:
        return f"heads of {D} channels: the kernels take up to {KERNEL_WIDTHS[depth]}"
    return None
