"""minLSTM: channels that each fade and take up at rates the token chooses.

Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201, section 3.2, with the forget and input
gates normalised to a sum of one, so that the state keeps its scale over time.
"""

import dataclasses

from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init

from memlm.memory.base import register
from memlm.memory.min_gru import DiagonalConfig, DiagonalMemory, wide


@dataclasses.dataclass(kw_only=True)
class MinLSTMConfig(DiagonalConfig):
    """As DiagonalConfig; forget_bias: start value of the bias in the forget gate f. Positive values
    let the state fade slowly from the start."""

    memory = "min_lstm"
    forget_bias: float = 0.0


@register("min_lstm", MinLSTMConfig)
class MinLSTM(DiagonalMemory):
    """h_t = f'_t h_{t-1} + i'_t g(h_proj x_t) with f' = f / (f + i), i' = i / (f + i).

    f and i are sigmoids of f_proj x_t and i_proj x_t; g as in minGRU.
    """

    gates = ("f_proj", "i_proj")

    def init_weights(self) -> None:
        init.constant_(self.f_proj.bias, self.config.forget_bias)

    def keep_and_take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        forget, take = (F.logsigmoid(wide(layer(x))) for layer in (self.f_proj, self.i_proj))
        # f / (f + i) = sigmoid(log f - log i), also where both gates round to zero.
        return (forget - take).sigmoid(), (take - forget).sigmoid()
