"""The projections of an attention layer, for memories that start from them."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """Weights of one attention layer without biases, [out, in] as in `nn.Linear`.

    Attributes:
        q: [num_heads * head_dim, hidden_size].
        k, v: [num_kv_heads * head_dim, hidden_size].
        o: [hidden_size, num_heads * head_dim].
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads.
        head_dim: channels per head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
