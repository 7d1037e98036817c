"""Linear recurrences in chunks, plain torch: see `segments`, `delta_chunks`, `additive_chunks`.

Every segment is gathered, worked through and scattered while it lies in the cache; what its
backward pass needs goes to buffers over all chunks.
"""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence import additive_chunks, delta_chunks, step
from memlm.cuda.linear_recurrence.gates import (
    ChunkDecays,
    DecayGradients,
    token_gate_gradients,
    token_gates,
)
from memlm.cuda.linear_recurrence.inputs import Inputs, first_chunk_slots
from memlm.cuda.linear_recurrence.reference import L2_NORM_EPS
from memlm.cuda.linear_recurrence.segments import Segment, Segments, chunk_bound, chunk_size


def forward(
    inputs: Inputs, chunk_states: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, final state, chunk states (empty unless asked for), and what `backward` needs."""
    B, T, _, HV, _, V = inputs.sizes
    v = inputs.v
    kept = v.new_zeros(
        inputs.chunk_states_shape if chunk_states else (0,), dtype=inputs.state_dtype
    )
    if inputs.initial_state is None:
        state = v.new_zeros(inputs.state_shape, dtype=inputs.state_dtype)
    else:
        state = inputs.initial_state.to(inputs.state_dtype)
    if T == 0:
        return v.new_empty(v.shape), state.clone(), kept, []
    one_token = _one_token_each(inputs, save)
    if one_token is not None:
        if chunk_states:
            _keep_first(inputs, state, kept)
        o, state = step.forward(one_token)
        return o.view(v.shape).to(v.dtype), state, kept, []
    work = _Work(inputs)
    segments = work.segments
    state = segments.ranked(state).flatten(0, 1)
    o = v.new_empty(B * T, HV, V)
    saved = _buffers(inputs, chunk_bound(inputs) if save else segments.widest)
    for part in segments.parts:
        rows, carry = work.rows(part), work.carry(part, state)
        buffers = [x[rows if save else slice(rows.stop - rows.start)] for x in saved]
        _, QK, values = work.load(part)
        arguments = (QK, values, work.decays.part(rows), inputs.scale, work.group, carry, buffers)
        if work.beta is None:
            found = additive_chunks.forward(*arguments)
        else:
            found = delta_chunks.forward(*arguments, work.beta[rows])
        segments.scatter(part, found, o)
        if chunk_states:
            segments.keep_states(part, buffers[-1], inputs.cu_seqlens, kept)
    if save:
        for x in saved:
            x[segments.chunks * HV :] = 0
    state = segments.unranked(state.view(inputs.state_shape))
    return o.view(v.shape), state, kept, saved if save else []


def backward(inputs: Inputs, saved: list[Tensor], do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of all of `Inputs.differentiable`, by name, and maybe of others."""
    B, T = inputs.q.shape[:2]
    if T == 0:
        found = {name: torch.zeros_like(x) for name, x in inputs.differentiable().items()}
        return found | {"initial_state": dstate.clone()}
    if not saved:
        return step.backward(inputs, do.squeeze(1), dstate)
    work = _Work(inputs)
    segments = work.segments
    do, dstate = do.flatten(0, 1), segments.ranked(dstate).flatten(0, 1)
    dq, dk, dv = (x.new_empty(B * T, *x.shape[2:]) for x in (inputs.q, inputs.k, inputs.v))
    gates = DecayGradients.like(work.decays)
    dbeta = None if work.beta is None else torch.empty_like(work.beta)
    for part in reversed(segments.parts):
        rows, dcarry = work.rows(part), work.carry(part, dstate)
        factor, QK, values = work.load(part)
        D = work.load_output_gradient(part, do)
        buffers = [x[rows] for x in saved]
        arguments = (QK, values, work.decays.part(rows), buffers, D, dcarry, gates.part(rows))
        if work.beta is None:
            dQK, found = additive_chunks.backward(*arguments)
        else:
            dQK, found = delta_chunks.backward(*arguments, work.beta[rows], dbeta[rows])
        segments.scatter(part, found, dv)
        dQ, dK = work.key_head_gradients(factor, QK, dQK)
        segments.scatter(part, dQ, dq)
        segments.scatter(part, dK, dk)
    dlog_decay = None
    if work.log_decay is not None:
        dlog_decay = segments.ungates(gates.sum(), B * T)
    if dbeta is not None:
        dbeta = segments.ungates(dbeta.squeeze(-1), B * T)
    return {
        "q": dq.view(inputs.q.shape),
        "k": dk.view(inputs.k.shape),
        "v": dv.view(inputs.v.shape),
        "initial_state": segments.unranked(dstate.view(inputs.state_shape)),
        **token_gate_gradients(inputs, work.log_decay, dlog_decay, dbeta),
    }


def saved_like(inputs: Inputs) -> list[Tensor]:
    """Tensors of the shapes that `forward` saves."""
    T = inputs.q.shape[1]
    if T == 0 or (T == 1 and inputs.cu_seqlens is None):
        return []
    return _buffers(inputs, chunk_bound(inputs))


def _buffers(inputs: Inputs, chunks: int) -> list[Tensor]:
    """What the passes over `chunks` chunks save: see `delta_chunks`, `additive_chunks`."""
    _, _, _, HV, K, V = inputs.sizes
    C = chunk_size(inputs)
    shapes = [(C, C), (K, V)]
    if inputs.beta is not None:
        shapes = [(2 * C, C), (C, C), (C, V), (K, V)]
    return [inputs.v.new_empty(chunks * HV, *s, dtype=inputs.state_dtype) for s in shapes]


def _one_token_each(inputs: Inputs, save: bool) -> Inputs | None:
    """The inputs as a batch of sequences of one token, if they are that.

    Packed sequences only where nothing is saved, for what is saved must not depend on lengths.
    """
    T, cu_seqlens = inputs.q.shape[1], inputs.cu_seqlens
    if cu_seqlens is None:
        return inputs if T == 1 else None
    if save or inputs.sequences != T or cu_seqlens.tolist() != list(range(T + 1)):
        return None
    turned = {name: getattr(inputs, name).transpose(0, 1) for name in ("q", "k", "v")}
    if inputs.beta is not None:
        turned["beta"] = inputs.beta.transpose(0, 1)
    if inputs.log_decay is not None and inputs.log_decay.ndim == 3:
        turned["log_decay"] = inputs.log_decay.transpose(0, 1)
    return dataclasses.replace(inputs, cu_seqlens=None, **turned)


def _keep_first(inputs: Inputs, state: Tensor, out: Tensor) -> None:
    """Write the chunk states of sequences of one token: their initial states."""
    if inputs.cu_seqlens is None:
        out[:, 0] = state
    else:
        out[0, first_chunk_slots(inputs.cu_seqlens)] = state


class _Work:
    """The inputs in chunks.

    Attributes:
        group: value heads per key head.
        log_decay: of every token, or None.
        decays: of the chunks of all segments.
        beta: write strengths ``[chunks * HV, C, 1]``, or None.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        _, _, H, HV, _, _ = inputs.sizes
        self.group = HV // H
        self.segments = segments = Segments(inputs)
        self.q, self.k, self.v = (x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v))
        self.log_decay, beta = token_gates(inputs)
        if self.log_decay is None:
            shape = (segments.chunks * HV, segments.size)
            log_decay = inputs.v.new_zeros(shape, dtype=inputs.state_dtype)
        else:
            log_decay = segments.gates(self.log_decay)
        self.decays = ChunkDecays.of(log_decay)
        self.beta = None if beta is None else segments.gates(beta).unsqueeze(-1)

    def rows(self, part: Segment) -> slice:
        """The chunks times value heads of a segment."""
        HV = self.v.shape[1]
        return slice(part.chunks.start * HV, part.chunks.stop * HV)

    def carry(self, part: Segment, states: Tensor) -> Tensor:
        """The states of a segment's sequences, of those of all by rank."""
        HV = self.v.shape[1]
        return states[part.ranks.start * HV : part.ranks.stop * HV]

    def load(self, part: Segment) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of a segment's M chunks of value heads: what norms queries and keys ``[M, 2 C, 1]`` or
        None, queries over keys ``[M, 2 C, K]``, values ``[M, C, V]``."""
        segments, dtype = self.segments, self.decays.future.dtype
        chunks, C = part.chunks.stop - part.chunks.start, segments.size
        H, K = self.q.shape[1:]
        lead = (len(part.steps), len(part.ranks))
        QK = self.q.new_empty(*lead, H, self.group, 2, C, K, dtype=dtype)
        QK[:, :, :, :, 0] = segments.gather(part, self.q).unsqueeze(3)
        QK[:, :, :, :, 1] = segments.gather(part, self.k).unsqueeze(3)
        QK = QK.view(-1, 2 * C, K)
        factor = None
        if self.inputs.qk_l2norm:
            factor = (QK.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt_()
            QK *= factor
        HV, V = self.v.shape[1:]
        values = self.v.new_empty(*lead, HV, C, V, dtype=dtype)
        values.copy_(segments.gather(part, self.v))
        values = values.view(chunks, HV, C, V)
        if self.beta is None:
            segments.clear(part, values)
        return factor, QK, values.flatten(0, 1)

    def load_output_gradient(self, part: Segment, do: Tensor) -> Tensor:
        """Of a segment ``[M, C, V]``, times the scale and zero in empty slots; for the delta rule
        ``[M, 2 C, V]`` with the second half left open."""
        segments = self.segments
        HV, V = do.shape[1:]
        halves = 1 if self.beta is None else 2
        D = self.v.new_empty(
            (len(part.steps), len(part.ranks), HV, halves, segments.size, V),
            dtype=self.decays.future.dtype,
        )
        first = D[:, :, :, 0]
        first.copy_(segments.gather(part, do)).mul_(self.inputs.scale)
        segments.clear(part, first.flatten(0, 1))
        return D.view(-1, halves * segments.size, V)

    def key_head_gradients(
        self, factor: Tensor | None, QK: Tensor, dQK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of a segment's queries and keys ``[chunks * H, C, K]``, from those of the
        normed ones of every value head."""
        if self.group > 1:
            dQK = dQK.unflatten(0, (-1, self.group)).sum(1)
        if factor is not None:
            QK, factor = QK[:: self.group], factor[:: self.group]
            along = (dQK * QK).sum(-1, keepdim=True)
            dQK = dQK.addcmul_(QK, along, value=-1).mul_(factor)
        C = self.segments.size
        return dQK[:, :C], dQK[:, C:]
