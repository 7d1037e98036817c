"""Decays and write strengths: as the options give them, and how a chunk uses them."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.linear_recurrence.inputs import Inputs
from memlm.cuda.linear_recurrence.reference import natural_log_decay, sigmoid, write_strength

LOG_ZERO = -60.0  # exp of less counts as zero, which keeps denormal numbers out of the products


def token_gates(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Log decay, at least LOG_ZERO, and write strength of every token ``[B * T, HV]``."""
    log_decay = natural_log_decay(inputs)
    if log_decay is not None:
        log_decay = log_decay.clamp_min(LOG_ZERO)
    return log_decay, write_strength(inputs)


def token_gate_gradients(
    inputs: Inputs, log_decay: Tensor | None, dlog_decay: Tensor | None, dbeta: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of the inputs that `token_gates` depends on, from those of its results."""
    found = {}
    if dlog_decay is not None:
        if inputs.A_log is not None:
            found["A_log"] = (dlog_decay * log_decay).sum(0)
            raw = inputs.log_decay.to(dlog_decay.dtype).flatten(0, 1)
            slope = sigmoid(raw + inputs.dt_bias.to(raw.dtype))
            dlog_decay = slope.mul_(-inputs.A_log.to(raw.dtype).exp()).mul_(dlog_decay)
            found["dt_bias"] = dlog_decay.sum(0)
        if inputs.log_decay.ndim == 1:
            found["log_decay"] = dlog_decay.sum(0)
        else:
            found["log_decay"] = dlog_decay.view(inputs.log_decay.shape)
    if dbeta is not None:
        if inputs.allow_neg_eigval:
            dbeta = 2 * dbeta
        if inputs.beta_sigmoid:
            beta = sigmoid(inputs.beta.to(dbeta.dtype).flatten(0, 1))
            dbeta = dbeta * beta * (1 - beta)
        found["beta"] = dbeta.view(inputs.beta.shape)
    return found


@dataclasses.dataclass
class ChunkDecays:
    """Decays within chunks of C tokens; M is chunks times heads.

    Attributes:
        total: float64 ``[M, C]``, G_i, the sum of log decays up to token i. Its differences decide
            what token i sees of token j, and in float32 the size of the sums would cost digits.
        since_start: ``[M, C, 1]``, e^{G_i}.
        to_end: ``[M, C, 1]``, e^{G_C - G_i}.
        whole: ``[M, 1, 1]``, e^{G_C}.
        future: ``[C, C]``, minus infinity for later tokens, else 0.
    """

    total: Tensor
    since_start: Tensor
    to_end: Tensor
    whole: Tensor
    future: Tensor

    @classmethod
    def of(cls, g: Tensor) -> "ChunkDecays":
        """From the log decays ``[M, C]``."""
        size = g.shape[1]
        total = g.double().cumsum(1)
        since_start = _exp(total.to(g.dtype))[:, :, None]
        to_end = _exp((total[:, -1:] - total).to(g.dtype))[:, :, None]
        future = torch.full((size, size), -torch.inf, dtype=g.dtype, device=g.device).triu_(1)
        return cls(total, since_start, to_end, since_start[:, -1:], future)

    def part(self, rows: slice) -> "ChunkDecays":
        """Those of some chunks."""
        return ChunkDecays(
            self.total[rows],
            self.since_start[rows],
            self.to_end[rows],
            self.whole[rows],
            self.future,
        )

    def between(self) -> Tensor:
        """Gamma ``[M, C, C]``: e^{G_i - G_j} for i >= j, else 0."""
        total = self.total
        difference = (total[:, :, None] - total[:, None, :]).to(self.future.dtype)
        return _exp(difference.add_(self.future))


def _exp(x: Tensor) -> Tensor:
    """exp of at most zero, itself zero at LOG_ZERO and below; exp of minus infinity is slow."""
    return F.threshold_(x.clamp_min(LOG_ZERO).exp_(), 1.001 * math.exp(LOG_ZERO), 0.0)


@dataclasses.dataclass
class DecayGradients:
    """What a chunk's tensors give to the gradient of its log decays, without cancellation.

    ``g_t`` is a factor of all that passes token t: from the start state or a token before t, to a
    token from t on or the end state. The terms are kept apart by where they begin and end, for the
    sum over all that begins and ends elsewhere would cancel only up to rounding.

    Attributes:
        from_start: ``[M, C]``, from the start state to token i.
        to_end: ``[M, C]``, from token j to the end state.
        inside: ``[M, C]``, between tokens on both sides of t.
        whole: ``[M, 1]``, from the start state to the end state.
        before: ``[C, C]``, 1 for j < t; from_now: 1 for i >= t.
    """

    from_start: Tensor
    to_end: Tensor
    inside: Tensor
    whole: Tensor
    before: Tensor
    from_now: Tensor

    @classmethod
    def like(cls, decays: ChunkDecays) -> "DecayGradients":
        """Empty ones."""
        from_start, to_end, inside = (torch.empty_like(decays.since_start[..., 0]) for _ in "123")
        before = torch.ones_like(decays.future).triu_(1)
        whole = torch.empty_like(decays.whole[..., 0])
        return cls(from_start, to_end, inside, whole, before, 1 - before)

    def part(self, rows: slice) -> "DecayGradients":
        """Those of some chunks."""
        chunks = (x[rows] for x in (self.from_start, self.to_end, self.inside, self.whole))
        return DecayGradients(*chunks, self.before, self.from_now)

    def put(self, from_start: Tensor, to_end: Tensor, inside: Tensor, whole: Tensor) -> None:
        """Set the terms.

        from_start, to_end: ``[M, C, 1]``; inside: ``[M, C, C]``, to token i from token j, of which
        only what is strictly lower counts; whole: ``[M, 1, 1]``.
        """
        self.from_start.copy_(from_start.squeeze(-1))
        self.to_end.copy_(to_end.squeeze(-1))
        crossing = torch.bmm(inside, self.before.expand_as(inside))  # [i, t]: from all j < t
        torch.sum(crossing.mul_(self.from_now), 1, out=self.inside)
        self.whole.copy_(whole.squeeze(-1))

    def sum(self) -> Tensor:
        """Gradient of the log decays ``[M, C]``."""
        found = self.from_start.flip(1).cumsum(1).flip(1)
        found[:, 1:] += self.to_end[:, :-1].cumsum(1)
        return found.add_(self.inside).add_(self.whole)
