"""Launches of the Triton kernels: sizes, buffers, and the split of long sequences.

Nothing here reads a number back from the device, and nothing is compiled anew for another length
or number of sequences. Configurations are fixed per (K, V) and width of the element.
"""

import dataclasses
import functools
import os

import torch
import triton
from torch import Tensor

from memlm.cuda.dispatch import interpreting
from memlm.cuda.linear_recurrence import triton_kernels as kernels
from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs

LARGEST = 256  # channels of a key or a value
SPLIT_VARIABLE = "MEMLM_SEQUENCE_SPLIT"
SEGMENT = 1024  # fewest tokens of a segment of a split sequence
LOW_PRECISION = (torch.bfloat16, torch.float16)


def refusal(inputs: Inputs) -> str | None:
    """Why these inputs cannot be taken; None where they can."""
    _, _, _, _, K, V = inputs.sizes
    if inputs.v.dtype == torch.float64:
        return "float64 is left to eager"
    if max(K, V) > LARGEST:
        return f"K = {K}, V = {V}: the kernels take up to {LARGEST} channels"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile and launch sizes: BK, BV channels of a tile, warps and pipeline stages."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def scan_config(K: int, V: int, dtype: torch.dtype) -> Config:
    """For the two scans: the state tile [BK, BV] stays in registers."""
    BK = max(16, triton.next_power_of_2(K))
    BV = max(16, min(64, triton.next_power_of_2(V)))
    if dtype == torch.float32:
        return Config(BK, min(BV, 32), 4 if BK <= 128 else 8, 1)
    return Config(BK, BV, 4 if BK <= 128 else 8, 2)


def solve_config(K: int, dtype: torch.dtype) -> Config:
    """For T_0: whole keys."""
    return Config(max(16, triton.next_power_of_2(K)), 0, 8, 1)


def gradient_config(K: int, V: int, dtype: torch.dtype) -> Config:
    """For the gradients of a chunk: three [C, BK] sums stay in registers."""
    widest = 32 if dtype == torch.float32 else 64
    BK = max(16, min(widest, triton.next_power_of_2(K)))
    BV = max(16, min(widest, triton.next_power_of_2(V)))
    return Config(BK, BV, 8, 1)


def step_config(K: int, V: int) -> Config:
    """For single tokens."""
    return Config(max(16, triton.next_power_of_2(K)), max(16, min(32, V // 16 * 16)), 4, 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs as the kernels take them.

    sequence_of_slot: int32 [slots], for packed sequences.
    """

    inputs: Inputs
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    cu_seqlens: Tensor | None
    sequence_of_slot: Tensor | None
    sequences: int
    slots: int
    decay: int

    @classmethod
    def of(cls, inputs: Inputs) -> "Problem":
        B, T = inputs.sizes[:2]
        dtype = inputs.v.dtype
        q, k, v = (_with_row_stride(x.to(dtype)) for x in (inputs.q, inputs.k, inputs.v))
        if inputs.log_decay is None:
            decay = kernels.DECAY_NONE
        elif inputs.A_log is not None:
            decay = kernels.DECAY_GATE
        else:
            constant = inputs.log_decay.ndim == 1
            decay = kernels.DECAY_CONSTANT if constant else kernels.DECAY_SCALAR
        log_decay = None if inputs.log_decay is None else inputs.log_decay.contiguous()
        beta = None if inputs.beta is None else inputs.beta.contiguous()
        problem = cls(inputs, q, k, v, log_decay, beta, None, None, B, B * -(-T // CHUNK), decay)
        return problem if inputs.cu_seqlens is None else problem.packed(inputs.cu_seqlens)

    def packed(self, cu_seqlens: Tensor) -> "Problem":
        """The same tokens as sequences with these boundaries."""
        sequences = cu_seqlens.shape[0] - 1
        tokens = self.inputs.sizes[0] * self.inputs.sizes[1]
        slots = tokens // CHUNK + sequences
        first = cu_seqlens[:-1] // CHUNK + torch.arange(sequences, device=cu_seqlens.device)
        every = torch.arange(slots, device=cu_seqlens.device)
        owner = torch.searchsorted(first, every, right=True, out_int32=True) - 1
        return dataclasses.replace(
            self,
            cu_seqlens=cu_seqlens.contiguous(),
            sequence_of_slot=owner,
            sequences=sequences,
            slots=slots,
        )

    @property
    def length(self) -> int:
        return self.inputs.sizes[1]

    @property
    def shape(self) -> dict[str, int]:
        _, _, H, HV, K, V = self.inputs.sizes
        return {"H": H, "HV": HV, "K": K, "V": V, "C": CHUNK}

    @property
    def switches(self) -> dict[str, object]:
        inputs = self.inputs
        return {
            "L2": inputs.qk_l2norm,
            "SIGMOID": inputs.beta_sigmoid,
            "DOUBLE": inputs.allow_neg_eigval,
            "PRECISION": "tf32" if inputs.v.dtype in LOW_PRECISION else "tf32x3",
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.v.device, dtype=dtype or self.v.dtype)


def _with_row_stride(x: Tensor) -> Tensor:
    """x [B, T, heads, channels] with tokens a constant stride apart and packed within."""
    B, T, heads, channels = x.shape
    packed = x.stride(3) == 1 and (heads == 1 or x.stride(2) == channels)
    if packed and (B == 1 or x.stride(0) == T * x.stride(1)):
        return x
    return x.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def segments(inputs: Inputs) -> int:
    """Into how many segments each sequence is cut so that the scans fill the card; 1: not at all.

    Set ``MEMLM_SEQUENCE_SPLIT=0`` to never cut: a row's results then do not depend, in the last
    bit, on the rows beside it.
    """
    if os.environ.get(SPLIT_VARIABLE) == "0" or inputs.v.device.type != "cuda" or interpreting():
        return 1
    B, T, _, HV, K, V = inputs.sizes
    tiles = -(-V // scan_config(K, V, inputs.v.dtype).BV)
    programs = inputs.sequences * HV * tiles
    length = T // inputs.sequences if inputs.cu_seqlens is not None else T
    return max(1, min(_processors(inputs.v.device) // max(1, programs), length // SEGMENT))


def forward(
    inputs: Inputs, chunk_states: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, final state, chunk states (empty unless asked for), and what `backward` needs:
    T_0 (with the delta rule), and for split sequences the segments' start states and maps."""
    problem = Problem.of(inputs)
    B, T, _, HV, _, V = inputs.sizes
    chunks = problem.empty(0, dtype=torch.float32)
    if chunk_states:
        chunks = torch.zeros(inputs.chunk_states_shape, device=inputs.v.device)
    o = problem.empty(B, T, HV, V)
    if T == 1 and inputs.cu_seqlens is None and not (save or chunk_states):
        state = problem.empty(*inputs.state_shape, dtype=torch.float32)
        return step(problem, inputs.initial_state, o, state), state, chunks, []
    T_0 = solve(problem) if inputs.beta is not None else None
    saved = [] if T_0 is None else [T_0]
    count = segments(inputs)
    if count == 1:
        state = scan(problem, T_0, inputs.initial_state, o=o, states=chunks if chunk_states else None)
        return o, state, chunks, saved if save else []
    split = Split.of(problem, count)
    starts, maps = split.start_states(T_0)
    ends = scan(split.problem, T_0, starts, o=o)
    if chunk_states:
        scan(problem, T_0, inputs.initial_state, states=chunks)
    saved += [starts, maps]
    return o, split.last(ends), chunks, saved if save else []


def saved_like(inputs: Inputs) -> list[Tensor]:
    """Empty tensors of the shapes that `forward` saves."""
    B, T, _, HV, K, V = inputs.sizes
    saved = []
    if inputs.beta is not None:
        saved.append(inputs.v.new_empty(B, T, HV, CHUNK))
    count = segments(inputs)
    if count > 1:
        rows = segment_slots(inputs, count)
        saved.append(inputs.v.new_empty(rows, HV, K, V, dtype=torch.float32))
        saved.append(inputs.v.new_empty(rows, HV, K, K, dtype=torch.float32))
    return saved


def backward(
    inputs: Inputs, saved: list[Tensor], do: Tensor, dstate: Tensor
) -> dict[str, Tensor]:
    """Gradients by the name of the input."""
    problem = Problem.of(inputs)
    whole = problem
    saved = list(saved)
    T_0 = saved.pop(0) if inputs.beta is not None else None
    initial = inputs.initial_state
    do = do.to(inputs.v.dtype).contiguous()
    dstate = dstate.float().contiguous()
    split = None
    if saved:
        initial, maps = saved
        split = Split.of(problem, segments(inputs))
        problem = split.problem
        dstate = split.end_gradients(T_0, maps, do, dstate)
    B, T, H, HV, K, V = inputs.sizes
    states = problem.empty(problem.slots, HV, K, V)
    # Without the delta rule V~ is V.
    v_new = problem.v.contiguous() if T_0 is None else problem.empty(B, T, HV, V)
    scan(problem, T_0, initial, states=states, v_new=None if T_0 is None else v_new, final=False)
    dends = problem.empty(problem.slots, HV, K, V)
    dR = problem.empty(B, T, HV, V)
    dinitial = reverse_scan(problem, T_0, do, dstate, dends=dends, dR=dR)
    if split is not None:
        dinitial = split.first(dinitial)
    gradients = chunk_gradients(problem, states, v_new, do, dends, dR)
    if inputs.initial_state is not None:
        gradients["initial_state"] = dinitial
    if inputs.log_decay is not None and inputs.log_decay.ndim == 1:
        gradients["log_decay"] = gradients["log_decay"].sum((0, 1))
    assert whole.v.shape == gradients["v"].shape
    return gradients


def solve(problem: Problem) -> Tensor:
    """T_0 [B, T, HV, C]."""
    B, T, H, HV, K, _ = problem.inputs.sizes
    config = solve_config(K, problem.v.dtype)
    T_0 = problem.empty(B, T, HV, CHUNK)
    if problem.slots == 0:
        return T_0
    kernels.solve_kernel[(problem.slots * H,)](
        problem.k,
        problem.beta,
        T_0,
        problem.cu_seqlens,
        problem.sequence_of_slot,
        problem.length,
        problem.k.stride(1),
        H=H,
        HV=HV,
        K=K,
        C=CHUNK,
        BK=config.BK,
        **problem.switches,
        **config.launch,
    )
    return T_0


def scan(
    problem: Problem,
    T_0: Tensor | None,
    initial_state: Tensor | None,
    o: Tensor | None = None,
    states: Tensor | None = None,
    v_new: Tensor | None = None,
    final: bool = True,
    zero_values: bool = False,
) -> Tensor | None:
    """Walk forward; returns the final states [sequences, HV, K, V] if `final`.

    With `zero_values` the values are zero and K wide: from the identity, the final states are then
    the linear maps of the sequences.
    """
    _, _, _, HV, K, V = problem.inputs.sizes
    V = K if zero_values else V
    config = scan_config(K, V, problem.v.dtype)
    state = problem.empty(problem.sequences, HV, K, V, dtype=torch.float32) if final else None
    if problem.sequences:
        kernels.scan_kernel[(problem.sequences * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            None if zero_values else problem.v,
            problem.log_decay,
            problem.beta,
            problem.inputs.A_log,
            problem.inputs.dt_bias,
            T_0,
            None if initial_state is None else initial_state.contiguous(),
            problem.cu_seqlens,
            o,
            state,
            states,
            v_new,
            problem.inputs.scale,
            problem.length,
            problem.q.stride(1),
            problem.k.stride(1),
            problem.v.stride(1),
            **problem.shape | {"V": V},
            BK=config.BK,
            BV=config.BV,
            DECAY=problem.decay,
            **problem.switches,
            **config.launch,
        )
    return state


def reverse_scan(
    problem: Problem,
    T_0: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    dends: Tensor | None = None,
    dR: Tensor | None = None,
) -> Tensor:
    """Walk back; returns the gradient of the initial states [sequences, HV, K, V]."""
    _, _, _, HV, K, V = problem.inputs.sizes
    config = scan_config(K, V, problem.v.dtype)
    dinitial = problem.empty(problem.sequences, HV, K, V, dtype=torch.float32)
    if problem.sequences:
        kernels.reverse_scan_kernel[(problem.sequences * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            problem.log_decay,
            problem.beta,
            problem.inputs.A_log,
            problem.inputs.dt_bias,
            T_0,
            do,
            dfinal_state,
            problem.cu_seqlens,
            dends,
            dR,
            dinitial,
            problem.inputs.scale,
            problem.length,
            problem.q.stride(1),
            problem.k.stride(1),
            **problem.shape,
            BK=config.BK,
            BV=config.BV,
            DECAY=problem.decay,
            **problem.switches,
            **config.launch,
        )
    return dinitial


def chunk_gradients(
    problem: Problem, states: Tensor, v_new: Tensor, do: Tensor, dends: Tensor, dR: Tensor
) -> dict[str, Tensor]:
    """Gradients of everything but the initial state, from what the scans wrote."""
    inputs = problem.inputs
    B, T, H, HV, K, V = inputs.sizes
    config = gradient_config(K, V, problem.v.dtype)
    found = {"q": problem.empty(B, T, H, K), "k": problem.empty(B, T, H, K), "v": dR}
    if inputs.beta is not None:
        found["v"] = problem.empty(B, T, HV, V)
        found["beta"] = problem.empty(B, T, HV, dtype=torch.float32)
    if inputs.log_decay is not None:
        found["log_decay"] = problem.empty(B, T, HV, dtype=torch.float32)
    dA_log = None
    if inputs.A_log is not None:
        dA_log = torch.zeros(problem.slots, HV, device=problem.v.device)
    dq_sum = dk_sum = None
    if HV > H or inputs.qk_l2norm:
        dq_sum, dk_sum = (problem.empty(B, T, H, K, dtype=torch.float32) for _ in range(2))
    if problem.slots:
        kernels.gradient_kernel[(problem.slots * H,)](
            problem.q,
            problem.k,
            problem.v,
            problem.log_decay,
            problem.beta,
            inputs.A_log,
            inputs.dt_bias,
            states,
            v_new,
            do,
            dends,
            dR,
            problem.cu_seqlens,
            problem.sequence_of_slot,
            found["q"],
            found["k"],
            found["v"],
            found.get("log_decay"),
            found.get("beta"),
            dA_log,
            dq_sum,
            dk_sum,
            inputs.scale,
            problem.length,
            problem.q.stride(1),
            problem.k.stride(1),
            problem.v.stride(1),
            **problem.shape,
            BK=config.BK,
            BV=config.BV,
            DELTA=inputs.beta is not None,
            DECAY=problem.decay,
            **problem.switches,
            **config.launch,
        )
    if inputs.A_log is not None:
        found["A_log"] = dA_log.sum(0)
        found["dt_bias"] = found["log_decay"].sum((0, 1))
    return found


def step(problem: Problem, state: Tensor | None, o: Tensor, new_state: Tensor) -> Tensor:
    """One token per row; new_state may be `state` itself. Returns o [B, 1, HV, V]."""
    inputs = problem.inputs
    B, _, H, HV, K, V = inputs.sizes
    config = step_config(K, V)
    switches = {key: value for key, value in problem.switches.items() if key != "PRECISION"}
    if B:
        kernels.step_kernel[(B * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            problem.v,
            problem.log_decay,
            problem.beta,
            inputs.A_log,
            inputs.dt_bias,
            state,
            o,
            new_state,
            inputs.scale,
            problem.q.stride(0),
            problem.k.stride(0),
            problem.v.stride(0),
            H=H,
            HV=HV,
            K=K,
            V=V,
            BK=config.BK,
            BV=config.BV,
            DELTA=inputs.beta is not None,
            DECAY=problem.decay,
            **switches,
            **config.launch,
        )
    return o


def segment_slots(inputs: Inputs, count: int) -> int:
    """Segments in all, used or not."""
    B, T = inputs.sizes[:2]
    if inputs.cu_seqlens is None:
        return B * count
    return T // segment_length(inputs, count) + inputs.sequences


def segment_length(inputs: Inputs, count: int) -> int:
    """Tokens of a segment: whole chunks."""
    T = inputs.sizes[1]
    length = T // inputs.sequences if inputs.cu_seqlens is not None else T
    return -(-length // (count * CHUNK)) * CHUNK


@dataclasses.dataclass(frozen=True)
class Split:
    """Sequences cut into segments that are scanned side by side.

    A segment maps its start state S to M S + B, exactly: M is what the scan makes of the identity
    with zero values, B what it makes of zero. The start states of all segments follow from these
    by one small product per segment.

    problem: the same tokens with segments for sequences (unused segments are empty).
    owner: int64 [segments], the sequence of each segment; fresh: bool, whether it is the first.
    final: int64 [sequences], the last segment of each.
    """

    problem: Problem
    owner: Tensor
    fresh: Tensor
    final: Tensor

    @classmethod
    def of(cls, problem: Problem, count: int) -> "Split":
        inputs = problem.inputs
        B, T = inputs.sizes[:2]
        device = problem.v.device
        length, rows = segment_length(inputs, count), segment_slots(inputs, count)
        every = torch.arange(rows, device=device)
        if inputs.cu_seqlens is None:
            owner, place = every // count, every % count
            start, end = owner * T, (owner + 1) * T
            final = torch.arange(B, device=device) * count + count - 1
        else:
            starts, ends = inputs.cu_seqlens[:-1].long(), inputs.cu_seqlens[1:].long()
            first = starts // length + torch.arange(len(starts), device=device)
            owner = torch.searchsorted(first, every, right=True) - 1
            place = every - first[owner]
            start, end = starts[owner], ends[owner]
            final = torch.cat((first[1:], every.new_full((1,), rows))) - 1
        begins = torch.minimum(start + place * length, end)
        boundaries = torch.cat((begins, every.new_full((1,), B * T)))
        return cls(problem.packed(boundaries), owner, place == 0, final)

    def start_states(self, T_0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Start state of every segment and its map M [segments, HV, K, K]."""
        inputs = self.problem.inputs
        _, _, _, HV, K, _ = inputs.sizes
        rows = self.problem.sequences
        eye = torch.eye(K, device=self.owner.device).expand(rows, HV, K, K)
        maps = scan(self.problem, T_0, eye, zero_values=True)
        added = scan(self.problem, T_0, None)
        fresh = torch.zeros_like(added)
        if inputs.initial_state is not None:
            fresh = inputs.initial_state.float().index_select(0, self.owner)
        starts = torch.empty_like(added)
        state = fresh[0]
        for row in range(rows):
            state = torch.where(self.fresh[row], fresh[row], state)
            starts[row] = state
            state = torch.baddbmm(added[row], maps[row], state)
        return starts, maps

    def end_gradients(
        self, T_0: Tensor | None, maps: Tensor, do: Tensor, dstate: Tensor
    ) -> Tensor:
        """Gradient of the end state of every segment, from those of the final states."""
        added = reverse_scan(self.problem, T_0, do, None)
        ends = torch.zeros_like(added).index_copy(0, self.final, dstate)
        gradient = torch.zeros_like(added[0])
        for row in reversed(range(self.problem.sequences)):
            ends[row] += gradient
            gradient = torch.baddbmm(added[row], maps[row].mT, ends[row])
            gradient = torch.where(self.fresh[row], 0.0, gradient)
        return ends

    def last(self, ends: Tensor) -> Tensor:
        """The final states of the sequences."""
        return ends.index_select(0, self.final)

    def first(self, starts: Tensor) -> Tensor:
        """Of one row per segment, those of the segments that begin a sequence."""
        begins = torch.cat((self.final.new_zeros(1), self.final[:-1] + 1))
        return starts.index_select(0, begins)
