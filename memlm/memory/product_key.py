"""Product-key memory: a large table of values, of which each token reads a few by learned keys.

Lample et al. 2019, "Large Memory Layers with Product Keys", arXiv 1907.05242; by default in the
form of Berges et al. 2024, "Memory Layers at Scale", arXiv 2412.09764 (memory+).
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.cuda import product_key_select
from memlm.errors import UserError
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, register
from memlm.memory.experts import ExpertTable
from memlm.memory.query_norm import QueryBatchNorm
from memlm.memory.usage import SlotUsage
from memlm.memory.value_table import ValueTable


@dataclasses.dataclass(kw_only=True)
class ProductKeyConfig(MemoryConfig):
    """Sizes and forms; the defaults are memory+'s.

    Attributes:
        num_keys: half keys in each of the two lists; the table has num_keys^2 slots.
        key_size: channels of a key, both halves together; default hidden_size / 2.
        num_heads: queries per token, each with its own keys.
        top_k: slots read per head.
        value_size: channels of a value; default hidden_size, which experts always have.
        query_norm: "layer" normalises each half query, so that keys stay in use from the start.
            "batch" normalises over the tokens of a call, as Lample et al. recommend: training then
            lets a token see later ones (padding is left out), evaluation does not. "none" is the
            released code of memory+.
        variant: "memory_plus" multiplies the weighted sum of values by silu(W1 x) and projects it;
            "plain" (Lample et al.) is the sum itself, projected where value_size is not
            hidden_size; "peer" (He 2024) has experts of one hidden unit in its slots.
        gated: multiply the output by sigmoid(w . x), one number per token.
    """

    num_keys: int = 1024
    key_size: int | None = None
    num_heads: int = 4
    top_k: int = 32
    value_size: int | None = None
    query_norm: Literal["layer", "batch", "none"] = "layer"
    variant: Literal["memory_plus", "plain", "peer"] = "memory_plus"
    gated: bool = False

    @property
    def slots(self) -> int:
        """Slots of the table."""
        return self.num_keys**2

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Channels of a key (both halves) and of a value."""
        key_size = self.key_size if self.key_size is not None else hidden_size // 2
        return key_size, self.value_size if self.value_size is not None else hidden_size

    def check_sizes(self, hidden_size: int) -> None:
        key_size, value_size = self.sizes(hidden_size)
        for name, value in (
            ("num_keys", self.num_keys),
            ("num_heads", self.num_heads),
            ("top_k", self.top_k),
            ("value_size", value_size),
        ):
            if value < 1:
                raise UserError(f"product_key: {name} is {value}, it must be at least 1")
        if key_size < 2 or key_size % 2:
            raise UserError(
                f"product_key: key_size is {key_size}, it must be a positive even number"
            )
        if self.top_k > self.num_keys:
            raise UserError(
                f"product_key: top_k {self.top_k} is more than num_keys {self.num_keys}; "
                "use top_k <= num_keys"
            )
        if self.variant == "peer" and value_size != hidden_size:
            raise UserError(
                f"product_key: value_size is {value_size}, but the experts of variant peer have "
                f"the width of the model, {hidden_size}; leave value_size out"
            )


@register("product_key", ProductKeyConfig)
class ProductKey(MemoryModule):
    """out = W2(y * silu(W1 x)), with y the weighted sum of the values of the chosen keys.

    A query per head, normalised, chooses top_k of num_keys^2 product keys; softmax over the chosen
    ones of a head; heads are summed. It carries nothing from token to token: the table is what it
    remembers. Layers with the same `share` use one table, each with its own keys, queries and
    projections. Other outputs than memory+'s: see `variant` and `gated` of the config.

    `usage` is a recorder while `memlm.memory.usage.record_usage` is active, else None.
    """

    def __init__(self, config: ProductKeyConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, n = config.num_heads, config.num_keys
        self.key_size, self.value_size = config.sizes(hidden_size)
        self.query_proj = nn.Linear(hidden_size, H * self.key_size)
        self.query_norm: nn.Module = nn.Identity()
        if config.query_norm == "layer":
            self.query_norm = nn.LayerNorm(self.key_size // 2)
        elif config.query_norm == "batch":
            self.query_norm = QueryBatchNorm(H * self.key_size)
        self.keys = nn.Parameter(torch.empty(H, 2, n, self.key_size // 2))
        self.values = self.build_shared(config, hidden_size) if config.share is None else None
        self.gate_proj = self.o_proj = self.scalar_gate = None
        if config.variant == "memory_plus":
            self.gate_proj = nn.Linear(hidden_size, self.value_size)
        if config.variant == "memory_plus" or self.value_size != hidden_size:
            self.o_proj = nn.Linear(self.value_size, hidden_size)
        if config.gated:
            self.scalar_gate = nn.Linear(hidden_size, 1)
        self.usage: SlotUsage | None = None
        self.init_weights()

    @classmethod
    def build_shared(cls, config: ProductKeyConfig, hidden_size: int) -> ValueTable | ExpertTable:
        table = ExpertTable if config.variant == "peer" else ValueTable
        return table(config.slots, config.sizes(hidden_size)[1])

    @property
    def key_bound(self) -> float:
        """Half keys start uniformly between this and its negative."""
        # The released codes differ: Lample et al. scale by the size of a half key.
        size = self.key_size // 2 if self.config.variant == "plain" else self.key_size
        return size**-0.5

    def init_weights(self) -> None:
        init.xavier_uniform_(self.query_proj.weight)
        init.uniform_(self.keys, -self.key_bound, self.key_bound)
        for linear in (self.gate_proj, self.o_proj, self.scalar_gate):
            if linear is not None:
                init.normal_(linear.weight, std=self.hidden_size**-0.5)

    def init_state(self, batch_size: int, device=None, dtype=None) -> None:
        return None

    def forward(self, hidden: Tensor, state: None, context: CallContext) -> tuple[Tensor, None]:
        x = context.layout.pack(hidden)
        tokens = x.flatten(0, 1)
        query = self.query_proj(tokens).view(-1, self.config.num_heads, 2, self.key_size // 2)
        indices, weights = product_key_select(self.query_norm(query), self.keys, self.config.top_k)
        if self.usage is not None:
            self.usage.record(indices, weights)
        values = context.shared[self.config.share] if self.values is None else self.values
        indices, weights = indices.flatten(1), weights.flatten(1)
        if self.config.variant == "peer":
            out = values(indices, weights, tokens)
        else:
            gate = None if self.gate_proj is None else self.gate_proj(tokens)
            out = values(indices, weights, gate)
        if self.o_proj is not None:
            out = self.o_proj(out)
        if self.scalar_gate is not None:
            out = out * self.scalar_gate(tokens).sigmoid()
        return context.layout.unpack(out.view(*x.shape[:2], out.shape[-1])), state

    def flops(self, tokens: int) -> int:
        """Projections, scores against both lists of half keys, and the rows that are read."""
        config = self.config
        linears = (self.query_proj, self.gate_proj, self.o_proj, self.scalar_gate)
        matrices = sum(linear.weight.numel() for linear in linears if linear is not None)
        tables = 2 if config.variant == "peer" else 1
        rows = config.num_heads * config.top_k * self.value_size * tables
        return 2 * tokens * (matrices + self.keys.numel() + rows)
