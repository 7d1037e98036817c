"""Causal self-attention: grouped queries, optional rotary positions, sliding window, short
convolution, and its own key/value state, so that any split of a document gives the same result.

Who sees whom is decided from positions and documents alone. The keys of the carried document live
in the state; padding and other documents are masked, never trusted to be absent.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from memlm.cuda.attention_step import native
from memlm.layers.attention_columns import behind_carried, behind_others, next_state
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.attention_state import AttentionState
from memlm.layers.blockwise import attend_in_blocks
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.continued_attention import continued_attention
from memlm.layers.continued_attention import suits as suits_continued
from memlm.layers.convolution import ConvolutionState, ShortConvolution, carried_tail
from memlm.layers.norm import RMSNorm
from memlm.layers.rotary import Rotary, rotate_both
from memlm.layers.sequence_group import tied
from memlm.layers.short_attention import short_causal_attention, suits


def _decodes(context: CallContext) -> bool:
    """Whether each row has the next token of its document, and nothing records the call."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    recorded = recorded or context.sequence is not None
    return context.layout.is_step and not context.layout.may_jump and not recorded


class Attention(nn.Module):
    """Multi-head attention through transformers' AttentionInterface (sdpa, eager, flash).

    Args:
        spec: sizes and choices.
        config: of the model; its hidden size and attention implementation are read.
        norm_eps: epsilon of the norms of queries and keys.
        zero_centered_norm: whether the gain of these is 1 + weight.

    Attributes:
        block_tokens: queries that attend at a time, see `memlm.models.activations.set_blockwise`.
    """

    is_causal = True
    # Whether a token in decoding may pass by `_project` and `_attend`.
    steps_natively = True
    # It attends to the columns of all processes that hold the rows together.
    shares_sequence = True

    def __init__(
        self,
        spec: AttentionConfig,
        config: PreTrainedConfig,
        norm_eps: float = 1e-6,
        zero_centered_norm: bool = False,
    ):
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config  # AttentionInterface functions read the implementation's name here
        spec.check_sizes(hidden_size)
        self.num_heads, self.num_key_value_heads, self.head_dim = spec.heads(hidden_size)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.rotary = None
        if spec.rope:
            turned = spec.rotary_channels(self.head_dim)
            self.rotary = Rotary.scaled(turned, spec.rope_theta, spec.rope_scaling)
        self.configured_window = spec.window
        self.window = spec.window
        self.block_tokens: int | None = None

        width = self.num_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=spec.qkv_bias)
        self.g_proj = (
            nn.Linear(hidden_size, width, bias=spec.qkv_bias) if spec.output_gate else None
        )
        self.o_proj = nn.Linear(width, hidden_size, bias=spec.output_bias)
        self.norm_all_heads = spec.qk_norm == "all_heads"
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if spec.qk_norm:
            sizes = (width, key_width) if self.norm_all_heads else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(n, norm_eps, zero_centered_norm) for n in sizes)
        self.convolution = (
            ShortConvolution(hidden_size, spec.conv_size, activation=None)
            if spec.conv_size
            else None
        )

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """No keys yet."""
        empty = torch.zeros(
            batch_size, 0, self.num_key_value_heads, self.head_dim, device=device, dtype=dtype
        )
        reach = self.convolution.kernel_size - 1 if self.convolution else 0
        tail = torch.zeros(batch_size, reach, self.q_proj.in_features, device=device, dtype=dtype)
        positions = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        return AttentionState(empty, empty, positions, tail)

    def forward(
        self, hidden: Tensor, state: AttentionState, context: CallContext
    ) -> tuple[Tensor, AttentionState]:
        """Attend to the carried document and to the documents of this call.

        Args:
            hidden: [B, T, hidden_size].
            state: what the B rows carry.
            context: positions and documents.

        Returns:
            [B, T, hidden_size] and the new state.
        """
        if self.convolution is not None:
            if context.sequence is not None:
                before = carried_tail(hidden, state.tail, context.layout, context.sequence)
                state = state.with_tail(before)
            hidden, tail = self.convolve(hidden, state, context.layout)
            state = state.with_tail(tail)
        angles = None
        if self.rotary is not None:
            angles = context.rotary_angles(self.rotary, hidden.dtype)
        sdpa = self.config._attn_implementation == "sdpa"
        if sdpa and self.steps_natively and _decodes(context) and state.has_no_gaps():
            heads = self._heads(hidden)
            if native.refusal(*heads) is None:
                output, state = self._native_step(*heads, angles, state, context)
                return self.output(output, hidden), state
            projected = self._turned(*heads, angles)
        else:
            projected = self._project(hidden, angles)
        output, state = self.over_documents(*projected, state, context)
        return self.output(output, hidden), state

    def over_documents(
        self, query: Tensor, key: Tensor, value: Tensor, state: AttentionState, context: CallContext
    ) -> tuple[Tensor, AttentionState]:
        """Attend to the keys of the call and of the carried document.

        Args:
            query, key, value: [B, T, heads, head_dim] of this call.
            state: what the B rows carry; its `tail` is passed on.
            context: positions and documents.

        Returns:
            The heads side by side, [B, T, num_heads * head_dim], and the new state.
        """
        layout = context.layout
        if _decodes(context) and (state.has_no_gaps() or not self._uses_flash()):
            return self._step(query, key, value, state, context)
        if context.sequence is not None:
            key, state = behind_others(key, value, state, context, self.window)
        keys, values, positions, documents = behind_carried(key, value, state, context)
        if self._uses_flash():
            output = self._packed(query, keys, values, documents, layout)
        elif keys.shape[1] > query.shape[1] and self._goes_on(query, state, context):
            output = continued_attention(query, keys, values, self.scaling)
        elif self.block_tokens is not None and query.shape[1] > self.block_tokens:
            output = self._blockwise(query, keys, values, positions, documents, layout)
        elif self.window is not None and query.shape[1] > self.window and bool(layout.valid.all()):
            output = self._banded(query, keys, values, positions, documents)
        else:
            output = self._masked(query, keys, values, positions, documents, layout)
        columns = (keys, values, positions, documents)
        state = next_state(state, *columns, layout, self.window)
        return output.flatten(2), state

    def _goes_on(self, query: Tensor, state: AttentionState, context: CallContext) -> bool:
        """Whether each row's tokens go on behind carried ones without gaps, and see all of them."""
        layout, plain = context.layout, self.steps_natively and context.sequence is None
        return (
            plain
            and self.window is None
            and self.config._attn_implementation == "sdpa"
            and layout.uniform
            and layout.all_continue
            and not layout.may_jump
            and suits_continued(query)
            and state.has_no_gaps()
        )

    def _uses_flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    def _step(
        self, query: Tensor, key: Tensor, value: Tensor, state: AttentionState, context: CallContext
    ) -> tuple[Tensor, AttentionState]:
        """As `over_documents`, for one token per row that continues the carried document.

        Nothing of the carried keys is copied, and they need no mask unless they have gaps.
        """
        room = state.roomy(key.dtype)
        room.append(key, value, context.position_ids)
        keys, values, positions = room.last(self.window)
        gapless, mask = state.has_no_gaps(), None
        if not gapless:
            documents = torch.where(positions >= 0, 0, -1)
            mask = self._visible(
                context.position_ids, context.layout.document, positions, documents
            ).unsqueeze(1)
        output = self._attend(query, keys, values, mask)
        return output.flatten(2), AttentionState.in_room(room, self.window, state.tail, gapless)

    def _native_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        state: AttentionState,
        context: CallContext,
    ) -> tuple[Tensor, AttentionState]:
        """As `_project` and `_step`, of float32 tensors on a CPU and a state without gaps."""
        room = state.roomy(key.dtype)
        first = 0 if self.window is None else max(0, room.filled + 1 - self.window)
        held = (room.keys, room.values, room.positions)
        heads = native.step(
            *(query, key, value, angles, context.position_ids),
            *held,
            *(first, room.filled, self.scaling),
        )
        room.filled += 1
        return heads, AttentionState.in_room(room, self.window, state.tail, True)

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [..., heads, head_dim] of [..., hidden_size], without positions."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        normed = not isinstance(self.q_norm, nn.Identity)
        if self.norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (query, key, value))
        if normed and not self.norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _project(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, T, heads, head_dim] of tokens [B, T, hidden_size].

        angles: of the tokens' positions, None without rotary positions.
        """
        return self._turned(*self._heads(hidden), angles)

    @staticmethod
    def _turned(
        query: Tensor, key: Tensor, value: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if angles is not None:
            query, key = rotate_both(query, key, *angles)
        return query, key, value

    def output(self, heads: Tensor, hidden: Tensor) -> Tensor:
        """The output [..., hidden_size] of the heads side by side, [..., num_heads * head_dim].

        hidden: the tokens [..., hidden_size] whose queries these are; they open the gate.
        """
        if self.g_proj is not None:
            heads = heads * self.g_proj(hidden).sigmoid()
        return self.o_proj(heads)

    def convolve(
        self, hidden: Tensor, state: AttentionState, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        """Rows [B, T, hidden_size] with the short convolution added, and its new tails."""
        carried = ConvolutionState(state.tail)
        incoming = layout.incoming(carried)
        mixed, tails = self.convolution(layout.pack(hidden), incoming.tail, layout)
        return hidden + layout.unpack(mixed), layout.outgoing(ConvolutionState(tails), carried).tail

    def _visible(
        self, position: Tensor, document: Tensor, key_position: Tensor, key_document: Tensor
    ) -> Tensor:
        """bool [..., Q, K]: same document, not later, within the window."""
        distance = position[..., :, None] - key_position[..., None, :]
        visible = (document[..., :, None] == key_document[..., None, :]) & (distance >= 0)
        if self.window is not None:
            visible &= distance < self.window
        return visible & (key_document >= 0)[..., None, :]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, Q, H, D] x [B, K, Hkv, D] -> [B, Q, H, D] through the AttentionInterface."""
        name = self.config._attn_implementation
        if mask is None and name == "sdpa":  # without a mask it is causal
            if query.shape[1] == 1:
                return self._attend_once(query, keys, values)
            if suits(query):
                return short_causal_attention(query, keys, values, self.scaling)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if mask is not None and name != "sdpa":
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        output, _ = attend(
            self,
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask,
            scaling=self.scaling,
        )
        return output

    def _attend_once(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `_attend`, of one query per row that sees all keys."""
        # The queries that share a key are as many queries of one head.
        query = query.view(len(query), keys.shape[2], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            query, keys.transpose(1, 2), values.transpose(1, 2), scale=self.scaling
        )
        return output.reshape(len(query), 1, -1, output.shape[-1])

    def _masked(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        documents: Tensor,
        layout: SequenceLayout,
    ) -> Tensor:
        """Every key against every query."""
        length = query.shape[1]
        whole = layout.uniform and keys.shape[1] == length
        reaches_all = self.window is None or self.window >= length
        if whole and reaches_all and self.config._attn_implementation == "sdpa":
            return self._attend(query, keys, values, None)  # plain causal: sdpa's own fast path
        document = documents[:, documents.shape[1] - length :]
        position = positions[:, positions.shape[1] - length :]
        visible = self._visible(position, document, positions, documents)
        # A padded query would otherwise see nothing, and softmax of nothing is NaN.
        padded = (document < 0)[:, :, None]
        diagonal = torch.eye(length, dtype=torch.bool, device=query.device)
        diagonal = F.pad(diagonal, (keys.shape[1] - length, 0))
        return self._attend(query, keys, values, (visible | (padded & diagonal))[:, None])

    def _blockwise(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        documents: Tensor,
        layout: SequenceLayout,
    ) -> Tensor:
        """As `_masked`, over `block_tokens` queries at a time."""
        # Padding may lie between a query and what it sees.
        window = self.window if bool(layout.valid.all()) else None
        attend = partial(self._masked, layout=layout)
        return attend_in_blocks(
            attend, self.block_tokens, query, keys, values, positions, documents, window
        )

    def _banded(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, documents: Tensor
    ) -> Tensor:
        """Blocks of `window` queries against two blocks of keys: cost linear in length.

        Without padding the `window` columns before a query hold everything it may see.
        """
        window = self.window
        batch_size, length = query.shape[:2]
        blocks = -(-length // window)
        extra = blocks * window - length
        front = window - (keys.shape[1] - length)

        def key_blocks(tensor: Tensor, fill: int = 0) -> Tensor:
            if front < 0:
                tensor = tensor[:, -front:]
            pad = [0, 0] * (tensor.ndim - 2) + [max(front, 0), extra]
            tensor = F.pad(tensor, pad, value=fill).unfold(1, 2 * window, window)
            return tensor.movedim(-1, 2).flatten(0, 1)

        def query_blocks(tensor: Tensor) -> Tensor:
            tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, extra])
            return tensor.unflatten(1, (blocks, window)).flatten(0, 1)

        visible = self._visible(
            query_blocks(positions[:, positions.shape[1] - length :]),
            query_blocks(documents[:, documents.shape[1] - length :]),
            key_blocks(positions, -1),
            key_blocks(documents, -1),
        )
        # The padding of the last block sees nothing; any visible key keeps its softmax finite.
        visible[:, :, window] |= ~visible.any(-1)
        output = self._attend(
            query_blocks(query), key_blocks(keys), key_blocks(values), visible[:, None]
        )
        return output.unflatten(0, (batch_size, blocks)).flatten(1, 2)[:, :length]

    def _packed(
        self, query: Tensor, keys: Tensor, values: Tensor, documents: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """Flash attention takes the borders of packed documents instead of a mask."""
        if not layout.num_tokens:
            return tied(torch.zeros_like(query), query, keys, values)
        batch_size, length = query.shape[:2]
        columns = documents.shape[1]
        key_index = (documents >= 0).flatten().nonzero().squeeze(1)
        key_label = (key_index // columns) * (columns + 1) + documents.flatten()[key_index]
        _, key_lengths = torch.unique_consecutive(key_label, return_counts=True)
        if layout.uniform:
            query_lengths = torch.full((batch_size,), length, device=query.device)
            packed_query = query.flatten(0, 1)[None]
        else:
            query_lengths = layout.cu_seqlens.diff()
            packed_query = layout.pack(query)
        borders = [
            F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            for lengths in (query_lengths, key_lengths)
        ]
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self,
            packed_query.transpose(1, 2),
            keys.flatten(0, 1)[key_index][None].transpose(1, 2),
            values.flatten(0, 1)[key_index][None].transpose(1, 2),
            None,
            scaling=self.scaling,
            sliding_window=self.window,
            cu_seq_lens_q=borders[0],
            cu_seq_lens_k=borders[1],
            max_length_q=int(query_lengths.max()),
            max_length_k=int(key_lengths.max()),
        )
        if layout.uniform:
            return output.squeeze(0).unflatten(0, (batch_size, length))
        return layout.unpack(output)

    def flops(self, tokens: int) -> int:
        """Floating point operations of one forward pass over one row of `tokens` tokens."""
        projections = [self.q_proj, self.k_proj, self.v_proj, self.o_proj]
        others = 0
        if self.g_proj is not None:
            projections.append(self.g_proj)
            others += self.g_proj.out_features
        for layer in projections:
            others += 2 * layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
        window = min(self.window or tokens, tokens)
        seen = tokens * window - window * (window - 1) // 2
        return tokens * others + 4 * seen * self.num_heads * self.head_dim
