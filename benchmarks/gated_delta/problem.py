"""The gated delta rule at one size: inputs, bytes, FLOPs."""

import dataclasses

import torch
from torch import Tensor

CHUNK = 64
INPUTS = ("q", "k", "v", "log_decay", "beta")


@dataclasses.dataclass(frozen=True)
class Problem:
    """B rows of T tokens, H query and key heads of K channels, HV value heads of V channels.

    lengths: of the sequences packed along T, then B is 1; empty: one sequence per row.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        heads = f"{self.H}" if self.H == self.HV else f"{self.H}/{self.HV}"
        return f"B={self.B} T={self.T} heads {heads} K={self.K} V={self.V}"

    @property
    def token_heads(self) -> int:
        """Tokens times value heads."""
        return self.B * self.T * self.HV

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """N, HV, K, V."""
        return (len(self.lengths) or self.B, self.HV, self.K, self.V)

    def tensors(self, seed: int = 0, grad: bool = True) -> dict[str, Tensor | None]:
        """Random inputs, with decays and write strengths as a new layer has them.

        q, k [B, T, H, K] are not of unit length yet. The decay rates are those of
        `memlm.memory.gated_delta`, A uniform in (0, 16) and steps log-uniform in (0.001, 0.1).
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        B, T, H, HV = self.B, self.T, self.H, self.HV

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=self.device)

        step = torch.exp(uniform(HV) * 4.6 - 6.9)
        gate = torch.nn.functional.softplus(normal(B, T, HV) + step.expm1().log())
        found = {
            "q": normal(B, T, H, self.K).to(self.dtype),
            "k": normal(B, T, H, self.K).to(self.dtype),
            "v": normal(B, T, HV, self.V).to(self.dtype),
            "log_decay": -16 * uniform(HV) * gate,
            "beta": normal(B, T, HV).sigmoid(),
        }
        found = {name: x.requires_grad_(grad) for name, x in found.items()}
        boundaries = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device)
        return found | {
            "initial_state": None,
            "cu_seqlens": boundaries if self.lengths else None,
        }

    def output_gradients(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Of the outputs [B, T, HV, V], and of the final states in float32."""
        generator = torch.Generator(self.device).manual_seed(seed)
        options = {"generator": generator, "device": self.device}
        do = torch.randn(self.B, self.T, self.HV, self.V, **options).to(self.dtype)
        return do, torch.randn(self.state_shape, **options)

    @property
    def input_bytes(self) -> int:
        """Of one set of inputs."""
        per_token = (2 * self.H * self.K + self.HV * self.V) * self.dtype.itemsize + 8 * self.HV
        return self.B * self.T * per_token

    def forward_bytes(self) -> int:
        """What the fused form moves, each tensor once per kernel.

        Two kernels: T_0 = (I + tril(diag(beta) K K^T))^-1 per chunk; then one walk over the chunks
        that reads q, k, v, T_0 and writes o. Gates are float32.
        """
        keys, values, solved = self._bytes_per_token_head()
        solve = keys + 4 + solved
        walk = 2 * keys + values + solved + 8 + values
        return int(self.token_heads * (solve + walk)) + self._state_bytes()

    def backward_bytes(self) -> int:
        """Two kernels: the chunks' start states again; then one walk back that reads the inputs,
        T_0, the states and do, and writes all gradients."""
        keys, values, solved = self._bytes_per_token_head()
        states = self.K * self.V * self.dtype.itemsize / CHUNK
        again = keys + values + solved + 8 + states
        walk = 2 * keys + 2 * values + solved + 8 + states + 2 * keys + values + 8
        return int(self.token_heads * (again + walk)) + self._state_bytes()

    def _bytes_per_token_head(self) -> tuple[float, int, int]:
        """Of q (or k), v and T_0, per value head."""
        size = self.dtype.itemsize
        return size * self.K * self.H / self.HV, size * self.V, size * CHUNK

    def _state_bytes(self) -> int:
        N, HV, K, V = self.state_shape
        return 4 * N * HV * K * V

    def forward_flops(self) -> int:
        """Of the matrix products of the chunk form, products of triangles counted whole.

        Per token: K K^T, Q K^T; K S, Q S, K^T V~; T R, P V~.
        """
        K, V, C = self.K, self.V, CHUNK
        shared = self.H / self.HV
        return int(self.token_heads * (2 * 2 * C * K * shared + 3 * 2 * K * V + 2 * 2 * C * V))

    def backward_flops(self) -> int:
        """As `forward_flops`: V~ and states again; dO V~^T, P^T dO, T^T dV~, dR V~^T; six products
        with the states and their gradients; K K^T, Q K^T and the four of dQ and dK."""
        K, V, C = self.K, self.V, CHUNK
        states, values, keys = 2 * K * V, 2 * C * V, 2 * C * K
        return int(self.token_heads * (2 * states + values + 4 * values + 6 * states + 6 * keys))

    def step_bytes(self) -> int:
        """Of a single token per row: the state is read and written."""
        return 2 * self._state_bytes() + self.input_bytes
