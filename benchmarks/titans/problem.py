"""titans-pytorch's NeuralMemory at one size, and the inputs of a comparison."""

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Problem:
    """B rows of T tokens of `channels`; one head, memory of two layers with `EXPANSION` x channels.

    chunk: tokens between updates of the memory, for storing and for reading.
    """

    channels: int
    chunk: int
    T: int
    B: int = 1
    dtype: torch.dtype = torch.float32

    EXPANSION = 4

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} d={self.channels} c={self.chunk}"

    def peer(self, seed: int = 0) -> nn.Module:
        """A new NeuralMemory with titans-pytorch's defaults.

        These take all gradients of the loss at the initial weights (`batch_size=None`): with
        gradients at later weights its defaults diverge on random tokens.

        Raises:
            ImportError: titans-pytorch is not installed.
        """
        from titans_pytorch import NeuralMemory

        torch.manual_seed(seed)
        layers = {"depth": 2, "expansion_factor": float(self.EXPANSION)}
        memory = NeuralMemory(self.channels, chunk_size=self.chunk, default_model_kwargs=layers)
        return memory.to(self.dtype)

    def inputs(self, seed: int = 1) -> Tensor:
        """Random tokens ``[B, T, channels]``."""
        return self._normal(seed).requires_grad_()

    def output_gradients(self, seed: int = 2) -> Tensor:
        """Of the outputs ``[B, T, channels]``."""
        return self._normal(seed)

    def _normal(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.B, self.T, self.channels, generator=generator).to(self.dtype)
