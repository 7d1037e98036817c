"""titans-pytorch's NeuralMemory, computed with `memlm.cuda.neural_memory`.

What titans-pytorch computes, per head, with chunks of c tokens and d channels per head:

- keys, values and step sizes per token from the tokens after `store_norm`; decay and momentum
  gates per chunk, from the mean of its tokens; queries from the tokens after `retrieve_norm`;
- the memory ``M(x) = x + LN(gelu(x W1) W2) (1 + gamma)``, where gamma is one of its weights; the
  loss is the mean over channels, so that its step sizes are d times ours;
- all gradients are taken at the initial weights; weights change at the end of a chunk, and token p
  reads the weights after ``floor((p + 1) / c)`` complete chunks.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.cuda.neural_memory import NeuralMemoryState, neural_memory


@dataclasses.dataclass
class StreamState:
    """What a call leaves to the next: the memory after the last complete chunk, and the tokens of
    the incomplete one ``[B, fewer than c, channels]``, whose gates are not known yet."""

    memory: NeuralMemoryState
    incomplete: Tensor


class ClosedFormMemory(nn.Module):
    """The same function as `peer`, with copies of its parameters under the same names.

    peer: a `titans_pytorch.NeuralMemory` with residual two-layer memories and without the options
    that its defaults leave out (other losses, several keys per token, spectral norms, ...).
    """

    PARTS = (
        "retrieve_norm",
        "store_norm",
        "to_queries",
        "to_keys",
        "to_values",
        "to_adaptive_step",
        "to_momentum",
        "to_decay_factor",
        "memory_model_parameters",
    )

    def __init__(self, peer: nn.Module):
        super().__init__()
        for name in self.PARTS:
            setattr(self, name, copy.deepcopy(getattr(peer, name)))
        self.step_size = peer.adaptive_step_transform
        self.chunk_size = peer.store_chunk_size

    def forward(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Outputs for tokens x ``[B, T, channels]``, both as of `peer`, and the state for more."""
        B, T, _ = x.shape
        if state is None:
            state = StreamState(self._initial_memory(B), x[:, :0])
        queries = self.to_queries(self.retrieve_norm(x))
        tokens = torch.cat((state.incomplete, x), 1)
        before = tokens.shape[1] - T  # tokens that are stored now and were read earlier
        complete = tokens.shape[1] // self.chunk_size * self.chunk_size
        outputs, memory = [], state.memory
        if complete:
            asking = F.pad(queries[:, : complete - before], (0, 0, before, 0))
            o, memory = self._chunks(asking, tokens[:, :complete], memory)
            outputs.append(o[:, before:])
        if complete < tokens.shape[1]:
            outputs.append(self._read(memory, queries[:, max(0, complete - before) :]))
        o = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return o, StreamState(memory, tokens[:, complete:])

    def _initial_memory(self, B: int) -> NeuralMemoryState:
        gain, *layers = (w.expand(B, *w.shape) for w in self.memory_model_parameters)
        weights = (*layers, gain)
        momentum = tuple(torch.zeros_like(w) for w in weights)
        offset = torch.zeros(B, dtype=torch.int64, device=gain.device)
        return NeuralMemoryState(weights, weights, momentum, offset)

    def _chunks(
        self, queries: Tensor, tokens: Tensor, memory: NeuralMemoryState
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Read and update over complete chunks."""
        stored = self.store_norm(tokens)
        theta = self.step_size(self.to_adaptive_step[0](stored)) / tokens.shape[-1]
        mean = stored.unflatten(1, (-1, self.chunk_size)).mean(2)
        gates = (self.to_decay_factor[0](mean), self.to_momentum[0](mean))
        alpha, eta = (gate.sigmoid().repeat_interleave(self.chunk_size, 1) for gate in gates)
        o, memory = neural_memory(
            *(x.unsqueeze(2) for x in (queries, self.to_keys(stored), self.to_values(stored))),
            *(alpha, eta, theta),
            state=memory,
            chunk_size=self.chunk_size,
            read="chunk_gates",
            refresh="never",
        )
        return o.squeeze(2), memory

    def _read(self, memory: NeuralMemoryState, queries: Tensor) -> Tensor:
        w1, w2, gain = (w.squeeze(1) for w in memory.weights)
        y = F.gelu(queries @ w1) @ w2
        return queries + F.layer_norm(y, y.shape[-1:]) * (1 + gain[:, None])
