"""One call as the Triton kernels take it, and the fixed sizes they are launched with."""

import dataclasses

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.boundaries import boundaries_beside
from memlm.cuda.dispatch import capability
from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs
from memlm.cuda.linear_recurrence.triton_tiles import (
    DECAY_CONSTANT,
    DECAY_GATE,
    DECAY_NONE,
    DECAY_SCALAR,
)

ALIGNMENT = 16  # of channels, rows and addresses, so that loads are whole


def target_of(device: torch.device) -> int:
    """Compute capability that decides sizes: 80, 90 or 100.

    Consumer Blackwell cards (12.x) have the matrix units and the shared memory of the 8.x ones.
    """
    found = capability(device)
    return 80 if found >= 120 else found


def chunk_length(inputs: Inputs) -> int:
    """Tokens of a chunk: fewer where products of 64 x 64 would not stay in registers."""
    return CHUNK if target_of(inputs.v.device) >= 90 else CHUNK // 2


def aligned(inputs: Inputs) -> Inputs:
    """The same with zero channels up to a multiple of ALIGNMENT, which change no other channel."""
    _, _, _, _, K, V = inputs.sizes
    k_pad, v_pad = -K % ALIGNMENT, -V % ALIGNMENT
    if not (k_pad or v_pad):
        return inputs
    state = inputs.initial_state
    return dataclasses.replace(
        inputs,
        q=F.pad(inputs.q, (0, k_pad)),
        k=F.pad(inputs.k, (0, k_pad)),
        v=F.pad(inputs.v, (0, v_pad)),
        initial_state=None if state is None else F.pad(state, (0, v_pad, 0, k_pad)),
    )


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


def scan_config(K: int, V: int, target: int, reverse: bool = False) -> Config:
    """For the two scans: the state tile [BK, BV] stays in registers."""
    BK = max(16, triton.next_power_of_2(K))
    BV, num_warps, num_stages = 32, 4, 2
    if BK <= 64 and target < 100:
        BV, num_warps = (64, 4) if target >= 90 else (32, 8)
    elif BK > 128:
        BV, num_warps = (32, 8) if target // 10 == 9 else (16, 4 if target < 90 else 8)
        num_stages = 3 if target >= 100 and not reverse else 2
    elif BK > 64 and target >= 100:
        num_warps = 8
    return Config(BK, max(16, min(BV, triton.next_power_of_2(V))), num_warps, num_stages)


def prepare_config(K: int, target: int, delta: bool) -> Config:
    """For whole keys and queries."""
    num_warps = 4 if delta and target < 90 else 8
    return Config(max(16, triton.next_power_of_2(K)), 0, num_warps, 1)


def gradient_config(K: int, V: int, target: int, grouped: bool) -> Config:
    """For the gradients of a chunk: three [C, BK] sums stay in registers."""
    BK, BV = 64, 32
    if target < 90:
        BV = 16
    elif target >= 100:
        BK, BV = 32, 16 if grouped else 32
    elif grouped:
        BK, BV = 32, 64 if K > 64 else 32
    BK = max(16, min(BK, triton.next_power_of_2(K)))
    return Config(BK, max(16, min(BV, triton.next_power_of_2(V))), 8, 1)


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
            decay = DECAY_NONE
        elif inputs.A_log is not None:
            decay = DECAY_GATE
        else:
            constant = inputs.log_decay.ndim == 1
            decay = DECAY_CONSTANT if constant else DECAY_SCALAR
        log_decay = None if inputs.log_decay is None else inputs.log_decay.contiguous()
        beta = None if inputs.beta is None else inputs.beta.contiguous()
        if inputs.A_log is not None:
            gates = {"A_log": inputs.A_log.contiguous(), "dt_bias": inputs.dt_bias.contiguous()}
            inputs = dataclasses.replace(inputs, **gates)
        problem = cls(inputs, q, k, v, log_decay, beta, None, None, B, 0, decay)
        if inputs.cu_seqlens is not None:
            return problem.packed(inputs.cu_seqlens)
        return dataclasses.replace(problem, slots=B * -(-T // problem.chunk))

    def packed(self, cu_seqlens: Tensor) -> "Problem":
        """The same tokens as sequences with these boundaries."""
        cu_seqlens = boundaries_beside(cu_seqlens, self.v)
        sequences = cu_seqlens.shape[0] - 1
        tokens = self.inputs.sizes[0] * self.inputs.sizes[1]
        slots = tokens // self.chunk + sequences
        first = cu_seqlens[:-1] // self.chunk + torch.arange(sequences, device=cu_seqlens.device)
        every = torch.arange(slots, device=cu_seqlens.device)
        owner = torch.searchsorted(first, every, right=True, out_int32=True) - 1
        return dataclasses.replace(
            self,
            cu_seqlens=cu_seqlens,
            sequence_of_slot=owner,
            sequences=sequences,
            slots=slots,
        )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return chunk_length(self.inputs)

    @property
    def target(self) -> int:
        """See `target_of`."""
        return target_of(self.v.device)

    @property
    def length(self) -> int:
        return self.inputs.sizes[1]

    @property
    def shape(self) -> dict[str, int]:
        _, _, H, HV, K, V = self.inputs.sizes
        return {"H": H, "HV": HV, "K": K, "V": V, "C": self.chunk}

    @property
    def switches(self) -> dict[str, object]:
        inputs = self.inputs
        return {
            "L2": inputs.qk_l2norm,
            "SIGMOID": inputs.beta_sigmoid,
            "DOUBLE": inputs.allow_neg_eigval,
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.v.device, dtype=dtype or self.v.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Float32, to be added to."""
        return torch.zeros(shape, device=self.v.device, dtype=torch.float32)


def _with_row_stride(x: Tensor) -> Tensor:
    """x [B, T, heads, channels] with tokens a constant stride apart, and packed within.

    The stride of tokens is that of dimension 1. A copy where the kernels could not load 16 bytes
    at a time.
    """
    B, T, heads, channels = x.shape
    stride = x.stride(0) if T == 1 else x.stride(1)
    packed = x.stride(3) == 1 and (heads == 1 or x.stride(2) == channels)
    regular = B == 1 or x.stride(0) == T * stride
    aligned = stride % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    if packed and regular and aligned:
        return x.as_strided(x.shape, (T * stride, stride, channels, 1))
    return x.clone(memory_format=torch.contiguous_format)
