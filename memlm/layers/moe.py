"""A mixture of experts: many gated feed-forward layers, of which each token uses a few.

Shazeer et al. 2017, arXiv 1701.06538; experts for all tokens beside them: Dai et al. 2024
(DeepSeekMoE), arXiv 2401.06066. A token gets the experts that the router gives it whatever the
others get: no expert has a capacity, so nothing of a token depends on its neighbours.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.errors import UserError
from memlm.layers.blockwise import in_blocks
from memlm.layers.mlp import SwiGLU

# Grouped products on a GPU want rows of a multiple of 16 bytes.
_ROW_BYTES = 16


@dataclasses.dataclass(kw_only=True)
class MixtureOfExpertsConfig:
    """Sizes of the `moe` feed-forward layer.

    Attributes:
        num_experts: experts of which the router chooses.
        experts_per_token: how many each token uses.
        intermediate_size: width of one expert; None = the model's.
        shared_intermediate_size: width of an expert that all tokens use, times the sigmoid of its
            own gate; None = no such expert.
        normalize_weights: whether the weights of a token's experts sum to one; False keeps their
            probabilities among all experts.
        balance_loss: factor of the loss that keeps all experts in use (Fedus et al. 2021, Switch
            Transformer, arXiv 2101.03961, equations 4 to 6, summed over the choices of a token):
            num_experts times the sum over the experts of their share of the tokens times their
            mean probability, of each layer and call. It is `experts_per_token` where all are used
            alike. Only gradients have it; the loss that is reported does not. 0 = none.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    intermediate_size: int | None = None
    shared_intermediate_size: int | None = None
    normalize_weights: bool = True
    balance_loss: float = 0.0

    def check_sizes(self, hidden_size: int) -> None:
        """Raise UserError for sizes that cannot work."""
        for name in (
            "num_experts",
            "experts_per_token",
            "intermediate_size",
            "shared_intermediate_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} is more than num_experts "
                f"{self.num_experts}"
            )
        if not 0 <= self.balance_loss < math.inf:
            raise UserError(f"balance_loss must be at least 0 and finite, got {self.balance_loss}")


class MixtureOfExperts(nn.Module):
    """sum_e weight_e down_e(silu(gate_e x) * up_e x) over the experts of a token.

    Attributes:
        router: [E, D], one row per expert; the probabilities of the experts are the softmax over
            all rows, in float32 or wider.
        gate_up_proj: [E, 2 I, D], gate above up.
        down_proj: [E, D, I].
        balance_scale: weight of a token in the loss of balance, see `set_balance_scale`; None =
            that of a mean over the tokens of the call.
        block_tokens: tokens of a row at a time, see `memlm.models.activations.set_blockwise`.
    """

    def __init__(
        self,
        config: MixtureOfExpertsConfig,
        hidden_size: int,
        intermediate_size: int,
        std: float = 0.02,
    ):
        """std: standard deviation of new weights; other sizes where the config has None."""
        super().__init__()
        config.check_sizes(hidden_size)
        self.config, self.std = config, std
        self.balance_scale: float | None = None
        self.block_tokens: int | None = None
        experts, width = config.num_experts, config.intermediate_size or intermediate_size
        self.router = nn.Parameter(torch.empty(experts, hidden_size))
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))
        shared = config.shared_intermediate_size
        self.shared_expert = None if shared is None else SwiGLU(hidden_size, shared)
        self.shared_gate = None if shared is None else nn.Linear(hidden_size, 1, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        for weight in (self.router, self.gate_up_proj, self.down_proj):
            init.normal_(weight, std=self.std)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size].

        valid: bool [...], False for padding, which is nothing to balance; None = all are tokens.
        """
        tokens = hidden.flatten(0, -2)
        # Over all tokens: how evenly the experts are used is a matter of the call.
        weights, experts = self.route(tokens, None if valid is None else valid.flatten())
        size = self.block_tokens and self.block_tokens * hidden.shape[:-2].numel()
        return in_blocks(self._of_experts, size, tokens, weights, experts).view_as(hidden)

    def _of_experts(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Tokens [N, D] through their experts; others [N, experts_per_token]."""
        per_token = self.config.experts_per_token
        # Pairs of token and expert, those of an expert one behind the other.
        order = experts.flatten().argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(experts.flatten(), minlength=self.config.num_experts)
        gate, up = grouped_linear(
            _Dispatch.apply(tokens, order, place, per_token), self.gate_up_proj, counts
        ).chunk(2, -1)
        rows = grouped_linear(F.silu(gate) * up, self.down_proj, counts)
        rows = rows * weights.flatten().index_select(0, order).to(rows.dtype)[:, None]
        output = _Combine.apply(rows, order, place, per_token)
        if self.shared_expert is not None:
            output = output + self.shared_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return output

    def route(self, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of the experts of tokens [N, D], both [N, experts_per_token].

        Weights have float32, or float64 where the tokens have. valid: bool [N], see `forward`.
        """
        logits = F.linear(tokens, self.router)
        wide = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.softmax(-1, dtype=wide)
        weights, experts = probabilities.topk(self.config.experts_per_token)
        if self.config.balance_loss and probabilities.requires_grad:
            gradient = self._balance_gradient(experts, valid).to(wide)
            weights = _Balanced.apply(probabilities, gradient).gather(-1, experts)
        if self.config.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def _balance_gradient(self, experts: Tensor, valid: Tensor | None) -> Tensor:
        """Of the loss of balance to the probabilities, [N, E]; `experts` [N, experts_per_token]."""
        count = self.config.num_experts
        if valid is None:
            valid = torch.ones(len(experts), dtype=torch.bool, device=experts.device)
        chosen = valid[:, None].expand_as(experts).flatten().to(torch.float32)
        uses = torch.zeros(count, device=experts.device).index_add_(0, experts.flatten(), chosen)
        tokens = valid.sum().clamp(min=1)
        scale = 1 / tokens if self.balance_scale is None else self.balance_scale
        return valid[:, None] * (self.config.balance_loss * scale * count * uses / tokens)

    @property
    def idle_parameters(self) -> int:
        """How many parameters a token leaves unused: those of the other experts."""
        each = self.gate_up_proj[0].numel() + self.down_proj[0].numel()
        return (self.config.num_experts - self.config.experts_per_token) * each

    def flops(self, tokens: int) -> int:
        """Floating point operations of one forward pass over `tokens` tokens."""
        used = sum(parameter.numel() for parameter in self.parameters()) - self.idle_parameters
        return 2 * tokens * used


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every group of rows times its own matrix.

    Args:
        x: [rows, D], the rows of group 0 first.
        weight: [groups, O, D].
        counts: int64 [groups], rows of each group, `rows` in total.

    Returns:
        [rows, O].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as every product is, but not grouped ones
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if device == "cuda" and takes_one_product(x, weight):
        return one_product(x, weight, counts)
    sizes = {group: size for group, size in enumerate(counts.tolist()) if size}
    if not sizes:
        return F.linear(x, weight[0])
    # Unbound under autograd: the gradient of all matrices is then put together once.
    matrices = weight.unbind(0) if torch.is_grad_enabled() and weight.requires_grad else weight
    pieces = x.split(list(sizes.values()))
    products = (F.linear(rows, matrices[group]) for group, rows in zip(sizes, pieces, strict=True))
    return torch.cat(list(products))


def takes_one_product(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies all groups at once: bfloat16 with aligned rows."""
    aligned = all(size * x.element_size() % _ROW_BYTES == 0 for size in weight.shape[1:])
    return x.dtype == weight.dtype == torch.bfloat16 and aligned and len(x) > 0


def one_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` by torch's grouped product, which waits for no count."""
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)


def set_balance_scale(model: nn.Module, scale: float) -> None:
    """Tell every mixture of experts the weight of a token in a step of several calls, so that its
    loss of balance is their mean, weighted by their tokens."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.balance_scale = scale


class _Balanced(torch.autograd.Function):
    """Probabilities as they are, with a further gradient on the way back: that of a loss that is
    added to whatever is made of them, without being carried there."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient + ctx.saved_tensors[0], None


class _Dispatch(torch.autograd.Function):
    """Tokens [N, D] -> one row per pair of token and expert [N k, D], ordered by expert.

    Its gradient and that of `_Combine` are each other: sums in a fixed order, without atomics.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.per_token = per_token
        return _spread(tokens, order, per_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        _, place = ctx.saved_tensors
        return _gather(gradient, place, ctx.per_token), None, None, None


class _Combine(torch.autograd.Function):
    """Rows of pairs [N k, D], ordered by expert -> the sum of those of each token [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.per_token = per_token
        return _gather(rows, place, per_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        order, _ = ctx.saved_tensors
        return _spread(gradient, order, ctx.per_token), None, None, None


def _spread(tokens: Tensor, order: Tensor, per_token: int) -> Tensor:
    return tokens.index_select(0, order // per_token)


def _gather(rows: Tensor, place: Tensor, per_token: int) -> Tensor:
    return rows.index_select(0, place).view(len(rows) // per_token, per_token, rows.shape[1]).sum(1)
