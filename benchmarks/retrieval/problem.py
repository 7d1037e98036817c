"""What is searched: vectors like the hidden states of a language model, always the same."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

VOCABULARY = 32_768
DOCUMENT = 1024  # tokens
MEMORY = 0.97  # of the context, from a token to the next
CONTEXT, NOISE = 1.0, 0.5  # standard deviations; that of a token's own vector is 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes: `queries` vectors of `width` channels against `stored` ones, the `k` best of each."""

    stored: int
    width: int
    queries: int = 512
    k: int = 32

    def vectors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Unit vectors: queries [queries, width] and keys [stored, width], float32.

        A token's vector (tokens are drawn by Zipf's law), a context that changes slowly within a
        document (an autoregression of first order) and noise are added up and normalised as by a
        LayerNorm. Queries are taken out of the documents at random places.
        """
        total = self.stored + self.queries
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCABULARY, self.width, generator=generator)
        often = 1 / torch.arange(1, VOCABULARY + 1).double()
        documents = -(-total // DOCUMENT)
        states = torch.empty(DOCUMENT, documents, self.width)
        context = torch.randn(documents, self.width, generator=generator)
        for state in states:
            fresh = torch.randn(documents, self.width, generator=generator)
            context = MEMORY * context + (1 - MEMORY**2) ** 0.5 * fresh
            tokens = torch.multinomial(often, documents, replacement=True, generator=generator)
            state.copy_(table[tokens] + CONTEXT * context)
            state += NOISE * torch.randn(state.shape, generator=generator)
        states = states.transpose(0, 1).reshape(-1, self.width)[:total]
        states = F.normalize(F.layer_norm(states, (self.width,)), dim=-1)
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.randperm(total, generator=generator)[: self.queries]] = True
        return states[chosen], states[~chosen]
