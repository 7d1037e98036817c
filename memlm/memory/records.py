"""What memories that learn while they read can be asked to record: surprise, and faulty updates."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class Surprise:
    """The loss of every token at the weights at which its gradient is taken, per head.

    Attributes:
        calls: of each call of the model, [B, T, H], 0 at padding.
    """

    def __init__(self) -> None:
        self.calls: list[Tensor] = []
        self._parts: list[Tensor] = []

    def take(self, part: Tensor) -> None:
        """Surprise [tokens, H] of some tokens of the present call."""
        self._parts.append(part.flatten(0, -2))

    def finish(self, arrange: Callable[[Tensor], Tensor]) -> None:
        """The call is over; `arrange` makes [B, T, H] of all its tokens, [tokens, H]."""
        self.calls.append(arrange(torch.cat(self._parts)))
        self._parts = []

    def joined(self) -> Tensor:
        """The calls one after the other, [B, T, H]."""
        return torch.cat(self.calls, 1)


class UpdateCounts:
    """Counts of a memory's updates, kept on its device until `read` asks for them."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def take(
        self, x: Tensor, output: Tensor, weights: tuple[Tensor, ...], clipped: Tensor | None
    ) -> None:
        """Count a call.

        Args:
            x: what the memory was given; where that is not finite, the fault lies elsewhere.
            output: what was read, [..., H, D].
            weights: per layer [N, H, ...], after the call.
            clipped: bool [..., H], tokens whose gradient was shortened; None without a bound.
        """
        broken = sum((~w.isfinite()).flatten(2).any(-1).sum() for w in weights)
        sums = torch.stack(
            [
                torch.as_tensor(output[..., 0].numel(), device=output.device),
                broken.new_zeros(()) if clipped is None else clipped.sum(),
                ((~output.isfinite()).any(-1).sum() + broken) * x.isfinite().all(),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, device: torch.device | None = None) -> Tensor:
        """int64 [3]: reads of a token by a head, those of them whose update was clipped, and reads
        and weights that were not finite; the next counts start at zero."""
        sums, self._sums = self._sums, None
        return torch.zeros(3, dtype=torch.int64, device=device) if sums is None else sums


@contextlib.contextmanager
def record_surprise(model: nn.Module) -> Iterator[dict[str, Surprise]]:
    """Record the surprise of every neural memory of `model`, by module name.

    Recomputed passes (gradient checkpointing) are recorded again; on a GPU the memory runs without
    its fused kernels, which do not report it.
    """
    with _attached(model, "surprise", Surprise) as records:
        yield records


@contextlib.contextmanager
def count_updates(model: nn.Module) -> Iterator[dict[str, UpdateCounts]]:
    """Count the updates of every neural memory of `model`, by module name."""
    with _attached(model, "updates", UpdateCounts) as records:
        yield records


@contextlib.contextmanager
def _attached(model: nn.Module, attribute: str, make: Callable[[], object]) -> Iterator[dict]:
    modules = {name: m for name, m in model.named_modules() if hasattr(m, attribute)}
    records = {name: make() for name in modules}
    for name, module in modules.items():
        setattr(module, attribute, records[name])
    try:
        yield records
    finally:
        for module in modules.values():
            setattr(module, attribute, None)
