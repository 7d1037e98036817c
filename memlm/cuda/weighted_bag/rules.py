"""The update rules of a table's rows, and what each keeps per row."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LazyAdam:
    """Adam (Kingma and Ba, 2015) on the rows that were read; the others stay as they are.

    When every row is read it is torch.optim.AdamW. Bias is corrected by the updates of the table,
    as in torch.optim.SparseAdam, not by those of the row.

    Attributes:
        learning_rate, betas, eps: as in torch.optim.AdamW.
        step: updates of the table, this one included.
        weight_decay: decoupled, of the rows that were read.
        scale: what gradients are multiplied by first.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    step: int
    weight_decay: float = 0.0
    scale: float = 1.0

    @property
    def step_size(self) -> float:
        """The rate after the correction of the first moment's bias."""
        return self.learning_rate / (1 - self.betas[0] ** self.step)

    @property
    def second_bias(self) -> float:
        """Root of the second moment's bias."""
        return (1 - self.betas[1] ** self.step) ** 0.5

    @staticmethod
    def init_state(values: Tensor) -> dict[str, Tensor]:
        """Moments [N, V] of both orders."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return {name: torch.zeros_like(values, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad (Duchi et al., 2011) with one accumulator per row, the mean over its channels.

    As in FBGEMM's exact row-wise Adagrad (Mudigere et al. 2022, arXiv 2104.05158): a state of N
    numbers instead of 2 N V.

    Attributes:
        learning_rate, eps: as in torch.optim.Adagrad.
        weight_decay: decoupled, of the rows that were read.
        scale: what gradients are multiplied by first.
    """

    learning_rate: float
    eps: float
    weight_decay: float = 0.0
    scale: float = 1.0

    @staticmethod
    def init_state(values: Tensor) -> dict[str, Tensor]:
        """The sum [N] of mean squares."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return {"square_sum": values.new_zeros(values.shape[0], dtype=dtype)}


Rule = LazyAdam | RowwiseAdagrad
