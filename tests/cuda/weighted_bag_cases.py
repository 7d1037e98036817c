"""Bags for tests: inputs, the formula, what comes out of a function, and dense AdamW beside it."""

import torch
from torch.nn import functional as F

# Tokens, length of a bag, rows, width.
CASES = [
    (7, 5, 11, 48),
    (33, 3, 6, 100),
    (20, 17, 64, 384),
    (1, 1, 1, 1),
    (0, 4, 9, 5),
    (6, 0, 4, 7),
]


def problem(tokens=9, bag=5, rows=11, width=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    indices = torch.randint(0, rows, (tokens, bag), generator=generator, dtype=torch.int32)
    if tokens > 1 and bag > 1:
        indices[0] = rows // 2  # the same row several times in one bag
    weights = draw(tokens, bag)
    if dtype in (torch.bfloat16, torch.float16):
        weights = weights.float()
    return indices, weights, draw(rows, width), draw(tokens, width), draw(tokens, width)


def formula(indices, weights, values, gate=None):
    sums = (weights[..., None] * values[indices.long()]).sum(1)
    return sums if gate is None else sums * F.silu(gate)


def outcome(function, indices, weights, values, gate, dout):
    """Outputs and all gradients."""
    given = {"weights": weights, "values": values}
    given |= {} if gate is None else {"gate": gate}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    out = function(indices, *leaves.values())
    found = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def adamw(values, gradients, **options):
    """Dense AdamW's values after these gradients, one step each."""
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()
