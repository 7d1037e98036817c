"""SPAM: AdamW that clips spikes of single entries and starts its moments anew now and then."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

# After a reset, gradients that the second moment takes in before it judges others; the paper's
# authors wait as long in their code.
SETTLING_STEPS = 20
_PIECE = 1 << 16  # entries; three float32 pieces fit a cache of 1 MB


class Spam(torch.optim.Optimizer):
    """Spike-Aware Adam with Momentum Reset (Huang et al., 2025, arXiv:2501.06842), dense.

    In each step, entries of the gradient with g^2 > threshold * v are replaced by
    sign(g) * sqrt(threshold * v), v being the second moment before the step. Every `reset_every`
    steps both moments become zero, and the update is scaled by (1 - cos(pi k / (N + 1))) / 2 in
    the k-th step, k = 1 .. N = `warmup_steps`, after the reset. Bias corrections count all steps.
    The start of a run has the warm-up of its schedule instead.

    Entries whose second moment is zero are not clipped: rows of an embedding that no token read
    could otherwise never leave zero. Weight decay is decoupled and not scaled by the warm-up.

    The state of a parameter is `step` (a float32 scalar on the CPU), `exp_avg` and `exp_avg_sq`, as
    that of AdamW: a run may change from one to the other.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: as AdamW's.
        threshold: how far above its second moment a squared entry may be.
        reset_every: steps between resets.
        warmup_steps: at most `reset_every`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        reset_every: int = 500,
        warmup_steps: int = 150,
    ):
        self.threshold, self.reset_every = threshold, reset_every
        self.warmup_steps = warmup_steps
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient; gradients may be changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters that had no gradient in some step have done fewer.
            by_steps: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_steps.setdefault(self._steps(parameter), []).append(parameter)
            for steps, parameters in by_steps.items():
                self._update(parameters, steps, group)
        return loss

    def _steps(self, parameter: Tensor) -> int:
        """Steps that a parameter has done."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return int(state["step"])

    def _update(self, parameters: list[Tensor], steps: int, group: dict) -> None:
        # Every operation is element by element: with sharded weights, on one's own part.
        means, squares = (
            [_local(self.state[parameter][name]) for parameter in parameters]
            for name in ("exp_avg", "exp_avg_sq")
        )
        gradients = [_local(parameter.grad) for parameter in parameters]
        since = steps % self.reset_every  # steps since the reset
        if since == 0:
            torch._foreach_zero_(means)
            torch._foreach_zero_(squares)
        elif since >= SETTLING_STEPS:
            _clip(gradients, squares, self.threshold)
        beta1, beta2 = group["betas"]
        scale = self._warmup(steps)
        # Fused AdamW wants its counts of steps on the device; it adds one to each.
        counts = torch.full((len(parameters),), float(steps), device=gradients[0].device)
        adamw(
            [_local(parameter) for parameter in parameters],
            gradients,
            means,
            squares,
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] * scale,
            weight_decay=group["weight_decay"] / scale,  # times the rate it is what it was
            eps=group["eps"],
            maximize=False,
        )
        for parameter in parameters:
            self.state[parameter]["step"] += 1

    def _warmup(self, steps: int) -> float:
        """Scale of the update after `steps` steps."""
        since = steps % self.reset_every
        if steps < self.reset_every or since >= self.warmup_steps:
            return 1.0
        return (1 - math.cos(math.pi * (since + 1) / (self.warmup_steps + 1))) / 2


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _clip(gradients: list[Tensor], squares: list[Tensor], threshold: float) -> None:
    """Clip spikes in place."""
    if gradients[0].device.type == "cpu":
        # Pieces that stay in the cache, and only those with a spike: there is seldom one.
        pairs = zip(gradients, squares, strict=True)
        pieces = [piece for pair in pairs for piece in zip(*map(_pieces, pair), strict=True)]
        found = [(g, v) for g, v in pieces if g.numel() and not _calm(g, v, threshold)]
        gradients, squares = [g for g, _ in found], [v for _, v in found]
    if not gradients:
        return
    bounds = torch._foreach_mul(squares, threshold)
    torch._foreach_sqrt_(bounds)
    for bound in bounds:
        bound.masked_fill_(bound == 0, math.inf)
    torch._foreach_minimum_(gradients, bounds)
    torch._foreach_neg_(bounds)
    torch._foreach_maximum_(gradients, bounds)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.numel() <= _PIECE:
        return (tensor,)
    return tensor.split(max(1, _PIECE * len(tensor) // tensor.numel()))


def _calm(gradient: Tensor, square: Tensor, threshold: float) -> bool:
    """Whether g^2 / threshold <= v everywhere."""
    left = torch.addcmul(square, gradient, gradient, value=-1 / threshold)
    return bool(left.amin() >= 0)
