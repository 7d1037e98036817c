"""Linear recurrences in chunks, plain torch."""

import torch
from torch import Tensor

from memlm.cuda.chunking import ChunkLayout
from memlm.cuda.linear_recurrence.delta_chunks import LOG_ZERO, DeltaChunks, decays
from memlm.cuda.linear_recurrence.inputs import Inputs
from memlm.cuda.linear_recurrence.reference import natural_log_decay, write_strength

# Longer chunks cost digits in the cumulative log decays. On a CPU the work within a chunk decides
# (32 was the fastest of 16, 32 and 64), elsewhere the number of serial steps.
CHUNK_CPU, CHUNK_ACCELERATOR = 32, 64


def bridge(inputs: Inputs):
    """Temporary: the former eager path, differentiated by autograd."""
    B, T, H, HV, K, V = inputs.sizes
    dtype = inputs.state_dtype
    q, k = (x.to(dtype).repeat_interleave(HV // H, dim=2) for x in (inputs.q, inputs.k))
    if inputs.qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if inputs.cu_seqlens is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=q.device)
    else:
        lengths = inputs.cu_seqlens.diff().to(torch.int64)
    state = inputs.initial_state
    if state is None:
        state = q.new_zeros(inputs.state_shape)
    with torch.autocast(q.device.type, enabled=False):
        o, state = linear_recurrence_eager(
            q.flatten(0, 1),
            k.flatten(0, 1),
            inputs.v.to(dtype).flatten(0, 1),
            natural_log_decay(inputs),
            write_strength(inputs),
            inputs.scale,
            state.to(dtype),
            lengths,
        )
    return o.view(B, T, HV, V).to(inputs.v.dtype), state, None


def linear_recurrence_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `linear_recurrence_reference`."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    if log_decay is None:
        log_decay = torch.zeros(v.shape[:2], dtype=v.dtype, device=v.device)
    log_decay = log_decay.clamp_min(LOG_ZERO)
    if len(q) == len(lengths) and bool((lengths == 1).all()):
        return _step(q, k, v, log_decay, beta, scale, state)
    longest = int(lengths.max())
    size = CHUNK_CPU if q.device.type == "cpu" else CHUNK_ACCELERATOR
    layout = ChunkLayout.build(lengths, min(size, 1 << (longest - 1).bit_length()))
    heads = v.shape[1]
    active = layout.counts[0]
    chunks = [layout.to_chunks(x) for x in (q * scale, k, v, log_decay)]
    S = state[layout.order[:active]].flatten(0, 1)  # [sequences * HV, K, V]
    counts = [count * heads for count in layout.counts]
    if beta is None:
        o, last = _additive_chunks(*chunks, S, counts)
    else:
        o, last = DeltaChunks.apply(*chunks, layout.to_chunks(beta), S, counts)
    last = torch.cat((last.view(active, *state.shape[1:]), state[layout.order[active:]]))
    return layout.from_chunks(o, heads), last[layout.inverse_order]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    scale: float,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token for every sequence: the recurrence itself."""
    S = log_decay.exp()[:, :, None, None] * S
    delta = v
    if beta is not None:
        delta = beta[:, :, None] * (v - (k[:, :, None, :] @ S).squeeze(2))
    S = S + k[:, :, :, None] * delta[:, :, None, :]
    return (scale * q[:, :, None, :] @ S).squeeze(2), S


def _additive_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """The recurrence without the delta rule; arguments and results as of `DeltaChunks`."""
    gamma, decay = decays(g)
    B = (gamma[:, -1, :, None] * k).mT @ v
    starts, ends = [], []
    for b, a, after in zip(
        B.split(counts), decay[:, -1:].split(counts), [*counts[1:], 0], strict=True
    ):
        starts.append(S)
        S = torch.addcmul(b, a, S)
        if after < len(S):  # some sequences end here
            ends.append(S[after:])
            S = S[:after]
    o = torch.baddbmm((q * decay) @ torch.cat(starts), q @ k.mT * gamma, v)
    return o, torch.cat(ends[::-1])
