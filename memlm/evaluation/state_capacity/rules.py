"""Rules by which memories write pairs into a state and read them, at the best gates for storing.

Each rule is that of a memory module, called where the module calls it, with one head, no
convolution, no projections and no output norm: keys and values are given as they are.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from memlm.cuda import NeuralMemoryState, linear_recurrence, neural_memory, topk_search
from memlm.memory.gated_delta import GatedDelta, GatedDeltaConfig
from memlm.memory.linear_attention import LinearAttention, LinearAttentionConfig
from memlm.memory.retention import Retention, RetentionConfig
from memlm.memory.titans_config import TitansConfig
from memlm.memory.titans_memory import TitansMemory

_CHUNK = 16  # tokens whose gradients Titans takes at the same weights


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way to store pairs.

    Attributes:
        title: what tables call it.
        store_and_read: keys of unit length [B, N, D] and values [B, N, D], written one after the
            other into an empty state, and the step size; what each key then reads, [B, N, D].
        state_bytes: of the state of one head of D channels.
        step_sizes: tried; a rule without a step size has one entry, which it ignores.
    """

    title: str
    store_and_read: Callable[[Tensor, Tensor, float], Tensor]
    state_bytes: Callable[[int], int]
    step_sizes: tuple[float, ...] = (1.0,)


def additive(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """Sums of k v^T (Katharopoulos et al. 2020, without features: Schlag et al. 2021)."""
    return _matrix(keys, values, None, None)


def positive_features(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """Linear attention as its paper has it: features elu(x) + 1, an average of the values.

    Features of unit keys would hardly differ; here keys have channels of unit size, as those that
    a linear layer makes have.
    """
    wide = keys * keys.shape[-1] ** 0.5
    features = torch.where(wide > 0, wide + 1, wide.clamp(max=0).exp())
    ones = torch.ones_like(values[..., :1])
    read = _matrix(features, torch.cat((values, ones), -1), None, None)
    return read[..., :-1] / read[..., -1:]


def retention(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """Sums that keep 1 - 2^-5 per pair, the first head of Sun et al. 2023."""
    exponent = RetentionConfig().first_exponent
    decay = torch.full((1,), 1 - 2.0**-exponent, dtype=values.dtype).log()
    return _matrix(keys, values, decay, None)


def delta(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """The delta rule (Schlag et al. 2021); at step size 1 the new pair is read exactly."""
    return _matrix(keys, values, None, values.new_full((*values.shape[:2], 1), step_size))


def titans_depth_1(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """A linear memory of Titans: descent on ||k M - v||^2, gradients once per chunk."""
    return _titans(1, keys, values, step_size)


def titans_depth_2(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """A network of two layers, four times as wide inside, from the module's own initial weights."""
    return _titans(2, keys, values, step_size)


def knn_cache(keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    """The newest keys and values themselves, as many as take the bytes of a D x D matrix."""
    entries = _entries(keys.shape[-1])
    kept_keys, kept_values = keys[:, -entries:], values[:, -entries:]
    _, found = topk_search(keys, kept_keys, 1, "cosine")
    return kept_values.gather(1, found.expand(-1, -1, values.shape[-1]))


def _entries(channels: int) -> int:
    """Of a cache of 32-bit keys and values with the bytes of a matrix of the same channels."""
    return max(1, channels // 2)


def _matrix(keys: Tensor, values: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> Tensor:
    k, v = keys[:, :, None], values[:, :, None]
    _, state = linear_recurrence(k, k, v, log_decay, beta, scale=1.0, return_state=True)
    return torch.einsum("bhkv,bnhk->bnhv", state.to(v.dtype), k)[:, :, 0]


def _titans(depth: int, keys: Tensor, values: Tensor, step_size: float) -> Tensor:
    batch, pairs, channels = keys.shape
    module = _titans_module(depth, channels)
    weights = tuple(
        w.detach().to(values.dtype).expand(batch, *w.shape).contiguous()
        for w in module.initial_weights
    )
    momentum = tuple(map(torch.zeros_like, weights))
    offset = torch.zeros(batch, dtype=torch.int64)
    zero = keys.new_zeros(batch, pairs, 1)
    k, v = keys[:, :, None], values[:, :, None]
    _, state = neural_memory(
        k, k, v, zero, zero, zero + step_size,
        NeuralMemoryState(weights, weights, momentum, offset), _CHUNK,
    )  # fmt: skip
    return module.read(state.weights, k)[:, :, 0]


def _titans_module(depth: int, channels: int) -> TitansMemory:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TitansConfig(
            depth=depth, num_heads=1, head_dim=channels, conv_size=None, chunk_size=_CHUNK
        )
        return TitansMemory(config, channels)


def _matrix_bytes(module_class, config) -> Callable[[int], int]:
    """Of the state that a module of one head with as many value as key channels makes."""
    return lambda channels: module_class(config(channels), channels).init_state(1).nbytes


RULES = {
    "linear_attention": Rule(
        "linear attention, elu + 1",
        positive_features,
        _matrix_bytes(LinearAttention, lambda D: LinearAttentionConfig(num_heads=1, head_dim=D)),
    ),
    "retention": Rule(
        "retention, 1 - 2^-5",
        retention,
        _matrix_bytes(Retention, lambda D: RetentionConfig(num_heads=1, head_dim=D, expand_v=1.0)),
    ),
    "additive": Rule(
        "additive",
        additive,
        _matrix_bytes(
            LinearAttention,
            lambda D: LinearAttentionConfig(
                num_heads=1, head_dim=D, feature_map="identity", normalizer=False
            ),
        ),
    ),
    "delta": Rule(
        "delta rule",
        delta,
        _matrix_bytes(
            GatedDelta,
            lambda D: GatedDeltaConfig(
                num_heads=1, head_dim=D, expand_v=1.0, conv_size=None, decay=False
            ),
        ),
        (0.05, 0.2, 1.0),
    ),
    "titans_1": Rule(
        "Titans, depth 1",
        titans_depth_1,
        lambda D: _titans_module(1, D).init_state(1).nbytes,
        (0.02, 0.1, 0.5),
    ),
    "titans_2": Rule(
        "Titans, depth 2",
        titans_depth_2,
        lambda D: _titans_module(2, D).init_state(1).nbytes,
        (0.02, 0.05, 0.1),
    ),
    "knn_cache": Rule(
        "keys and values kept",
        knn_cache,
        lambda D: _entries(D) * 2 * D * torch.float32.itemsize,
    ),
}
