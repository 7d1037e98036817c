"""Forward and backward of the linear recurrence by Triton kernels, as operator.py calls them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.linear_recurrence.inputs import Inputs
from memlm.cuda.linear_recurrence.triton_launchers import (
    Prepared,
    chunk_gradients,
    reverse_scan,
    scan,
)
from memlm.cuda.linear_recurrence.triton_problem import Problem, aligned, chunk_length
from memlm.cuda.linear_recurrence.triton_split import Split, segment_slots, segments
from memlm.cuda.linear_recurrence.triton_step import step


def forward(
    inputs: Inputs, chunk_states: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, final state, chunk states (empty unless asked for), and what `backward` needs:
    the gated inverse (with the delta rule), and for split sequences the segments' start states and
    maps."""
    _, _, _, _, K, V = inputs.sizes
    inputs = aligned(inputs)
    o, state, chunks, saved = _forward(inputs, chunk_states, save)
    if chunk_states:
        chunks = chunks[..., :K, :V].contiguous()
    return o[..., :V].contiguous(), state[..., :K, :V].contiguous(), chunks, saved


def _forward(
    inputs: Inputs, chunk_states: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`forward` of aligned inputs."""
    problem = Problem.of(inputs)
    B, T, _, HV, _, V = inputs.sizes
    chunks = problem.empty(0, dtype=torch.float32)
    if chunk_states:
        chunks = problem.zeros(*inputs.chunk_states_shape)
    o = problem.empty(B, T, HV, V)
    if T == 1 and inputs.cu_seqlens is None and not (save or chunk_states):
        state = problem.empty(*inputs.state_shape, dtype=torch.float32)
        return step(problem, _dense(inputs.initial_state), o, state), state, chunks, []
    prepared = Prepared.of(problem)
    saved = [] if prepared.inverse is None else [prepared.inverse]
    count = segments(inputs)
    if count == 1:
        state = scan(
            problem, prepared, inputs.initial_state, o=o, states=chunks if chunk_states else None
        )
        return o, state, chunks, saved if save else []
    split = Split.of(problem, count)
    starts, maps = split.start_states(prepared)
    ends = scan(split.problem, prepared, starts, o=o)
    if chunk_states:
        scan(problem, prepared, inputs.initial_state, states=chunks)
    saved += [starts, maps]
    return o, split.last(ends), chunks, saved if save else []


def saved_like(inputs: Inputs) -> list[Tensor]:
    """Empty tensors of the shapes that `forward` saves."""
    inputs = aligned(inputs)
    B, T, _, HV, K, V = inputs.sizes
    saved = []
    if inputs.beta is not None:
        saved.append(inputs.v.new_empty(B, T, HV, chunk_length(inputs)))
    count = segments(inputs)
    if count > 1:
        rows = segment_slots(inputs, count)
        saved.append(inputs.v.new_empty(rows, HV, K, V, dtype=torch.float32))
        saved.append(inputs.v.new_empty(rows, HV, K, K, dtype=torch.float32))
    return saved


def backward(inputs: Inputs, saved: list[Tensor], do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients by the name of the input."""
    _, _, _, _, K, V = inputs.sizes
    inputs = aligned(inputs)
    _, _, _, _, K_wide, V_wide = inputs.sizes
    do = F.pad(do, (0, V_wide - V))
    dstate = F.pad(dstate, (0, V_wide - V, 0, K_wide - K))
    found = _backward(inputs, saved, do, dstate)
    found |= {name: found[name][..., :K] for name in ("q", "k")}
    found["v"] = found["v"][..., :V]
    if "initial_state" in found:
        found["initial_state"] = found["initial_state"][..., :K, :V]
    return found


def _backward(inputs: Inputs, saved: list[Tensor], do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """`backward` of aligned inputs."""
    problem = Problem.of(inputs)
    saved = list(saved)
    prepared = Prepared.of(problem, saved.pop(0) if inputs.beta is not None else None)
    initial = inputs.initial_state
    do = do.to(inputs.v.dtype).contiguous()
    dstate = dstate.float().contiguous()
    split = None
    if saved:
        initial, maps = saved
        split = Split.of(problem, segments(inputs))
        problem = split.problem
        dstate = split.end_gradients(prepared, maps, do, dstate)
    B, T, _, HV, K, V = inputs.sizes
    states = problem.empty(problem.slots, HV, K, V)
    # Without the delta rule V~ is V.
    v_new = problem.v.contiguous() if inputs.beta is None else problem.empty(B, T, HV, V)
    scan(
        problem,
        prepared,
        initial,
        states=states,
        v_new=None if inputs.beta is None else v_new,
        final=False,
        dense_states=True,
    )
    dends = problem.empty(problem.slots, HV, K, V)
    dR = problem.empty(B, T, HV, V)
    dinitial = reverse_scan(problem, prepared, do, dstate, dends=dends, dR=dR)
    if split is not None:
        dinitial = split.first(dinitial)
    gradients = chunk_gradients(problem, prepared, states, v_new, do, dends, dR)
    if inputs.initial_state is not None:
        gradients["initial_state"] = dinitial
    if inputs.log_decay is not None and inputs.log_decay.ndim == 1:
        gradients["log_decay"] = gradients["log_decay"].sum((0, 1))
    return gradients


def step_in_place(inputs: Inputs) -> Tensor:
    """Outputs of one token per row; the state is overwritten."""
    _, _, _, _, K, V = inputs.sizes
    wide = aligned(inputs)
    problem = Problem.of(wide)
    o = problem.empty(*wide.v.shape)
    step(problem, wide.initial_state, o, wide.initial_state)
    if wide is inputs:
        return o
    inputs.initial_state.copy_(wide.initial_state[..., :K, :V])
    return o[..., :V].contiguous()


def _dense(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()
