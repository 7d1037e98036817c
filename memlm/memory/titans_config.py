"""Sizes, conventions and start values of the Titans memories."""

import dataclasses
import math
from typing import Literal

from memlm.errors import UserError, nearest
from memlm.layers.attention_config import AttentionConfig
from memlm.memory.base import MemoryConfig

VARIANTS = ("lmm", "mac", "mag", "mal")
READS = ("inclusive", "chunk_start")
MAX_DEPTH = 4
ATTENTION_OPTIONS = (
    "window",
    "segment",
    "persistent_tokens",
    "attention_heads",
    "attention_conv",
    "rope",
    "qk_norm",
)


@dataclasses.dataclass(kw_only=True)
class TitansConfig(MemoryConfig):
    """Sizes, conventions and start values.

    Attributes:
        variant: "lmm", the memory alone; "mac", the memory as context of attention in segments;
            "mag", sliding-window attention gated with the memory; "mal", the memory, then
            sliding-window attention.
        depth: layers of the memory: 1, x W; 2 to 4, x + LN(.. gelu(x W1) W2 ..).
        num_heads: heads of the memory; default: as many as fill the hidden size.
        head_dim: channels of a head; default 64, or 32 in models narrower than 512.
        expansion: hidden channels per channel of a head, from depth 2 on.
        chunk_size: tokens that take their gradient at the same weights: part of the function.
        conv_size: tokens the short convolution sees; None = no convolution, q, k and v are SiLU of
            their projections.
        theta_max: upper bound of the step size of every head; default min(0.1, 1.6 / chunk_size),
            since the steps of a chunk add up on keys that repeat (0.1 with exact, where they do
            not); a fifth of it from depth 3 on, where all layers move at once: with the whole step
            less is found again of a chunk of keys. That is for learning; smaller steps are not
            stabler (see alpha_bias).
        average_momentum: S = eta S - (1 - eta) theta grad instead of S = eta S - theta grad.
        momentum: False = no momentum, eta is 0.
        decay: False = nothing is forgotten, alpha is 0.
        read: "inclusive", a token reads after its own write; "chunk_start", it reads the weights
            at the start of its chunk.
        refresh: when the weights at which gradients are taken are renewed: "chunk", "never", or
            that many tokens, a multiple of chunk_size.
        exact: at depth 1, take every gradient at the weights of the token before; the chunk size
            is then a matter of speed.
        clip: largest norm of a token's gradient; None = no bound.
        alpha_bias, eta_bias, theta_bias: start values of the biases of decay, momentum and step
            (before the sigmoid). Default of alpha_bias: -6, -9, -11 and -11 at depths 1 to 4.
            Behind a layer norm the loss is as curved as the squared weights are small, so it
            becomes exp(2 A) times more so while a row fades them by exp(-A), and the gradients of
            the outer model explode where step times curvature passes 2. On rows of 8192 tokens A
            is 1 with -9, 0.14 with -11.
        window: tokens that the attention of mag and mal sees.
        segment: tokens of a segment of mac.
        persistent_tokens: learned tokens that the attention of mac, mag and mal sees everywhere.
        attention_heads: heads of that attention; None = one per 64 channels.
        attention_conv: tokens of a short convolution before it; None = none.
        rope: rotary positions in it.
        qk_norm: RMSNorm on its queries and keys.
    """

    variant: str = "lmm"
    depth: int = 2
    num_heads: int | None = None
    head_dim: int | None = None
    expansion: int = 4
    chunk_size: int = 16
    conv_size: int | None = 4
    theta_max: float | None = None
    average_momentum: bool = True
    momentum: bool = True
    decay: bool = True
    read: Literal["inclusive", "chunk_start"] = "inclusive"
    refresh: str | int = "chunk"
    exact: bool = False
    clip: float | None = None
    alpha_bias: float | None = None
    eta_bias: float = 2.0
    theta_bias: float = 0.0
    window: int = 512
    segment: int = 64
    persistent_tokens: int = 16
    attention_heads: int | None = None
    attention_conv: int | None = None
    rope: bool = True
    qk_norm: bool = False

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Heads of the memory and channels of a head."""
        head_dim = self.head_dim
        if head_dim is None:
            head_dim = 64 if hidden_size >= 512 else 32
            if self.num_heads is not None:
                head_dim = max(1, hidden_size // self.num_heads)
        return self.num_heads or max(1, hidden_size // head_dim), head_dim

    @property
    def step_bound(self) -> float:
        """The largest step size."""
        if self.theta_max is not None:
            return self.theta_max
        bound = 0.1 if self.exact else min(0.1, 1.6 / self.chunk_size)
        return bound * (1.0 if self.depth < 3 else 0.2)

    @property
    def decay_bias(self) -> float:
        """The start value of the decay's bias."""
        if self.alpha_bias is not None:
            return self.alpha_bias
        return (-6.0, -9.0, -11.0, -11.0)[self.depth - 1]

    def conventions(self) -> dict[str, int]:
        """What belongs to the function that was trained though no weight shows it, as numbers."""
        refresh = {"chunk": -1, "never": 0, self.chunk_size: -1}.get(self.refresh, self.refresh)
        return {
            # Exact gradients know no chunks: there they are a matter of speed.
            "chunk_size": 0 if self.exact else self.chunk_size,
            "read": READS.index(self.read),
            "refresh": refresh,
            "exact": int(self.exact),
            "segment": self.segment if self.variant == "mac" else 0,
        }

    @property
    def delay(self) -> int:
        return self.chunk_size if self.read == "chunk_start" else 1

    @property
    def attention_window(self) -> int | None:
        return {"lmm": None, "mac": self.segment}.get(self.variant, self.window)

    def attention(self) -> AttentionConfig:
        """Sizes of the attention in mac, mag and mal."""
        return AttentionConfig(
            num_heads=self.attention_heads,
            rope=self.rope,
            qk_norm=self.qk_norm,
            conv_size=self.attention_conv,
            window=self.segment if self.variant == "mac" else self.window,
        )

    def check_sizes(self, hidden_size: int) -> None:
        if self.variant not in VARIANTS:
            raise UserError(
                f"titans: variant {self.variant!r} is not one of {', '.join(VARIANTS)}"
                f"{nearest(self.variant, VARIANTS)}"
            )
        if not 1 <= self.depth <= MAX_DEPTH:
            raise UserError(f"titans: depth is {self.depth}, it must be 1 to {MAX_DEPTH}")
        sizes = ("num_heads", "head_dim", "expansion", "chunk_size", "conv_size", "segment")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"titans: {name} is {value}, it must be at least 1")
        if self.persistent_tokens < 0:
            raise UserError(
                f"titans: persistent_tokens is {self.persistent_tokens}, it must be at least 0"
            )
        for name, value in (("theta_max", self.step_bound), ("clip", self.clip)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"titans: {name} is {value}, it must be positive and finite")
        self._check_conventions()
        if self.variant == "lmm":
            self._check_without_attention()
            return
        try:
            self.attention().check_sizes(hidden_size)
        except UserError as error:
            raise UserError(f"titans: attention of {self.variant}: {error}") from error

    def _check_without_attention(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ATTENTION_OPTIONS:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"titans: {name} is for attention, variant lmm has none")

    def _check_conventions(self) -> None:
        refresh = self.refresh
        if refresh not in ("chunk", "never") and (
            isinstance(refresh, str) or refresh < 1 or refresh % self.chunk_size
        ):
            raise UserError(
                f"titans: refresh is {refresh!r}, it must be chunk, never or a multiple of "
                f"chunk_size ({self.chunk_size})"
            )
        if self.read == "chunk_start" and refresh not in ("chunk", self.chunk_size):
            raise UserError(
                "titans: read chunk_start takes the weights at which gradients are taken; it needs "
                "refresh: chunk"
            )
        if self.exact and (
            self.depth > 1
            or self.read != "inclusive"
            or refresh != "chunk"
            or self.clip is not None
        ):
            raise UserError(
                "titans: exact is for depth 1 with read: inclusive, refresh: chunk and no clip"
            )
