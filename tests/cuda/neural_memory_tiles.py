"""The tile problem of `memlm.cuda.neural_memory`, solved by readable torch in any precision.

Kernels take tiles laid out by `memlm.cuda.chunking` and their gates as they are; `solve` is what
they are tested against, with autograd's gradients.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from memlm.cuda.chunking import ChunkLayout
from memlm.cuda.neural_memory.gates import TileGates, tile_gates

Layers = tuple[Tensor, ...]
TileFunction = Callable[..., tuple[Tensor, Layers, Layers]]


def make(
    lengths: tuple[int, ...],
    C: int,
    D: int,
    layers: int = 1,
    hidden: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], TileGates, dict[str, Layers], list[int]]:
    """Tokens ``[M, C, D]``, gates, states and counts of sequences of these lengths, in float64.

    Keys and queries have unit length, as the memories make them. Layers are D x hidden x ... x D.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layout = ChunkLayout.build(torch.tensor(lengths), C)
    tokens = sum(lengths)
    q, k = (torch.nn.functional.normalize(normal(tokens, 1, D), dim=-1) for _ in range(2))
    rates = [normal(tokens, 1).sigmoid() for _ in range(3)]
    gates = tile_gates(layout, 0.3 * rates[0], rates[1], 0.3 * rates[2], None)
    sizes = [D, *[hidden] * (layers - 1), D]
    shapes = [(layout.counts[0], a, b) for a, b in itertools.pairwise(sizes)]
    states = {
        name: tuple(scale * normal(*shape) / shape[1] ** 0.5 for shape in shapes)
        for name, scale in (("anchor", 1.0), ("weights", 1.0), ("momentum", 0.3))
    }
    rows = dict(zip("qkv", map(layout.to_chunks, (q, k, normal(tokens, 1, D))), strict=True))
    return (
        {name: x.to(device) for name, x in rows.items()},
        TileGates(*(x.to(device) for x in gates)),
        {name: tuple(x.to(device) for x in layers) for name, layers in states.items()},
        layout.counts,
    )


def solve(
    tile: TileFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: TileGates,
    anchor: Layers,
    weights: Layers,
    momentum: Layers,
    counts: list[int],
    refresh_every: int,
) -> tuple[Tensor, Layers, Layers, Layers]:
    """Outputs, and the anchor of every row's last tile, the weights and the momentum after it.

    tile: from q, k, v, gates of one step's tiles, anchor, weights and momentum to their outputs,
    weights and momentum.
    """
    outputs, finished = [], []
    steps = zip(*(x.split(counts) for x in (q, k, v)), gates.split(counts), strict=True)
    for j, (*tokens, gate) in enumerate(steps):
        active = len(tokens[0])
        if active < len(weights[0]):
            states = (anchor, weights, momentum)
            finished.append([tuple(x[active:] for x in state) for state in states])
            anchor, weights, momentum = (tuple(x[:active] for x in state) for state in states)
        if refresh_every and j and j % refresh_every == 0:
            anchor = weights
        o, weights, momentum = tile(*tokens, gate, anchor, weights, momentum)
        outputs.append(o)
    finished.append((anchor, weights, momentum))
    rows = [
        tuple(torch.cat(layer) for layer in zip(*reversed(pieces), strict=True))
        for pieces in zip(*finished, strict=True)
    ]
    return torch.cat(outputs), *rows


def linear_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: TileGates,
    anchor: Layers,
    weights: Layers,
    momentum: Layers,
) -> tuple[Tensor, Layers, Layers]:
    """x W with the gradients taken at the anchor."""
    error = 2 * (k @ anchor[0] - v)
    return _linear(q, k, error, gates, weights, momentum)


def exact_linear_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: TileGates,
    anchor: Layers,
    weights: Layers,
    momentum: Layers,
) -> tuple[Tensor, Layers, Layers]:
    """x W, every token's gradient at the weights before it: error by error, in order."""
    (W,), (S,) = weights, momentum
    errors = [2 * (k[:, :1] @ W - v[:, :1])]
    for t in range(1, k.shape[1]):
        key = k[:, t : t + 1]
        past = gates.G[:, t - 1, None, :t] * (key @ k[:, :t].mT)
        now = gates.beta[:, t - 1, None, None] * (key @ W)
        now = now + gates.f[:, t - 1, None, None] * (key @ S) - past @ torch.cat(errors, 1)
        errors.append(2 * (now - v[:, t : t + 1]))
    return _linear(q, k, torch.cat(errors, 1), gates, weights, momentum)


def _linear(
    q: Tensor, k: Tensor, error: Tensor, gates: TileGates, weights: Layers, momentum: Layers
) -> tuple[Tensor, Layers, Layers]:
    o = read(q, k, error, gates, weights[0], momentum[0])
    W, S = advance(k, error, gates, weights[0], momentum[0])
    return o, (W,), (S,)


def read(q: Tensor, k: Tensor, error: Tensor, gates: TileGates, W: Tensor, S: Tensor) -> Tensor:
    """q_t M_t of a layer whose inputs are k and whose errors are given."""
    carried = gates.beta[:, :, None] * (q @ W) + gates.f[:, :, None] * (q @ S)
    return carried - (q @ k.mT * gates.G.tril()) @ error


def advance(
    k: Tensor, error: Tensor, gates: TileGates, W: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and momentum of a layer at the end of the tile."""
    beta, f, mu = (x[:, None, None] for x in (gates.beta_end, gates.f_end, gates.mu_end))
    to_weights = (gates.g_end[:, :, None] * k).mT @ error
    to_momentum = (gates.n[:, :, None] * k).mT @ error
    return beta * W + f * S - to_weights, mu * S - to_momentum
