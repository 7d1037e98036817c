"""The arguments of one call, checked, as every implementation gets them."""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.boundaries import check_boundaries

CHUNK = 64  # tokens between the states that `return_chunk_states` gives


@dataclasses.dataclass(frozen=True)
class Inputs:
    """See `linear_recurrence` for shapes and meaning.

    log_decay is the natural log of the decay, or the raw gate where A_log and dt_bias are given;
    beta is raw where beta_sigmoid is set; q and k are raw where qk_l2norm is set.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    scale: float
    qk_l2norm: bool = False
    beta_sigmoid: bool = False
    allow_neg_eigval: bool = False

    @property
    def sequences(self) -> int:
        """N: sequences in the call."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, T, H, HV, K, V."""
        return (*self.q.shape[:3], self.v.shape[2], self.q.shape[3], self.v.shape[3])

    @property
    def state_dtype(self) -> torch.dtype:
        """float64 for float64 values, else float32."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """N, HV, K, V."""
        _, _, _, HV, K, V = self.sizes
        return (self.sequences, HV, K, V)

    @property
    def chunk_states_shape(self) -> tuple[int, ...]:
        """Shape of the chunk states: see `linear_recurrence`."""
        B, T, _, HV, K, V = self.sizes
        if self.cu_seqlens is None:
            return (B, -(-T // CHUNK), HV, K, V)
        return (1, T // CHUNK + self.sequences, HV, K, V)

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that take a gradient, by name."""
        names = ("q", "k", "v", "log_decay", "beta", "initial_state", "A_log", "dt_bias")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def check(self) -> None:
        """Raise ValueError for shapes that do not fit together."""
        for name in ("q", "k", "v"):
            x = getattr(self, name)
            if x.ndim != 4 or not x.is_floating_point():
                raise ValueError(
                    f"{name} is {x.dtype} {tuple(x.shape)}: "
                    "expected floating point [B, T, heads, channels]"
                )
        B, T, H, HV = self.sizes[:4]
        if self.k.shape != self.q.shape:
            raise ValueError(f"q is {tuple(self.q.shape)} but k is {tuple(self.k.shape)}")
        if self.v.shape[:2] != (B, T) or HV % H:
            raise ValueError(
                f"v is {tuple(self.v.shape)}: expected [{B}, {T}, HV, V] with HV a multiple of {H}"
            )
        decay = None if self.log_decay is None else tuple(self.log_decay.shape)
        if decay not in (None, (HV,), (B, T, HV)):
            raise ValueError(f"log_decay is {decay}: expected {(HV,)} or {(B, T, HV)}")
        if self.beta is not None and self.beta.shape != (B, T, HV):
            raise ValueError(f"beta is {tuple(self.beta.shape)}: expected {(B, T, HV)}")
        if self.initial_state is not None and self.initial_state.shape != self.state_shape:
            raise ValueError(
                f"initial_state is {tuple(self.initial_state.shape)}, expected {self.state_shape}"
            )
        self._check_options()
        if self.cu_seqlens is not None:
            check_boundaries(self.cu_seqlens, B, T)

    def _check_options(self) -> None:
        HV = self.v.shape[2]
        if (self.A_log is None) != (self.dt_bias is None):
            raise ValueError("A_log and dt_bias come together or not at all")
        if self.A_log is not None:
            if self.log_decay is None or self.log_decay.ndim != 3:
                raise ValueError("A_log and dt_bias need the raw gate [B, T, HV] as log_decay")
            for name in ("A_log", "dt_bias"):
                shape = tuple(getattr(self, name).shape)
                if shape != (HV,):
                    raise ValueError(f"{name} is {shape}: expected {(HV,)}")
        if self.beta is None and (self.beta_sigmoid or self.allow_neg_eigval):
            raise ValueError("beta_sigmoid and allow_neg_eigval need beta")


def first_chunk_slots(cu_seqlens: Tensor) -> Tensor:
    """Where the chunk states of each packed sequence begin, int64 [N].

    Sequence n owns the slots from ``cu_seqlens[n] // CHUNK + n`` on, one per CHUNK tokens begun;
    a slot that falls to no sequence stays zero. The places need no knowledge of the lengths.
    """
    starts = cu_seqlens[:-1].long()
    return starts // CHUNK + torch.arange(len(starts), device=starts.device)
