"""The short convolution by shifted multiply-adds, plain torch.

All sequences lie end to end in ``flat`` [total, D]. Outputs whose inputs all lie in the stretch are
computed block by block, so that what lies between (before the activation, before the norm) never
leaves the cache: four passes over a block beat one grouped convolution over everything. The first
outputs of each sequence, which also see its tail, are computed in a window of their own: the tail
followed by the first tokens.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.short_convolution.inputs import L2_NORM_EPS, Inputs

# Elements of a block per thread; 2^17 float32 of each tensor in use fit a core's second cache.
BLOCK_CPU = 1 << 17


@dataclasses.dataclass(frozen=True)
class Starts:
    """The first outputs of every sequence, those that may see its tail.

    Attributes:
        window: [N, reach + first, D], the tail and the `first` tokens after it, in the dtype of
            the computation; whatever follows where a sequence is shorter.
        valid: int64, which of the N * first outputs belong to their sequence; None for all.
        rows: int64, the token of each valid one; None where there are no other outputs.
    """

    window: Tensor
    valid: Tensor | None
    rows: Tensor | None

    @classmethod
    def build(cls, inputs: Inputs) -> "Starts":
        """Of a call with at least one token."""
        B, T, _ = inputs.x.shape
        reach, device, dtype = inputs.reach, inputs.x.device, inputs.compute_dtype
        if inputs.cu_seqlens is None:
            first = min(reach, T)
            window = torch.cat((inputs.tail, inputs.x[:, :first]), 1).to(dtype)
            if first == T:
                return cls(window, None, None)
            rows = torch.arange(0, B * T, T, device=device)[:, None]
            return cls(window, None, (rows + torch.arange(first, device=device)).flatten())
        starts, ends = inputs.cu_seqlens[:-1, None].long(), inputs.cu_seqlens[1:, None].long()
        rows = starts + torch.arange(reach, device=device)
        valid = (rows < ends).flatten().nonzero().squeeze(1)
        tokens = inputs.x[0, rows.clamp(max=T - 1)]
        window = torch.cat((inputs.tail, tokens), 1).to(dtype)
        return cls(window, valid, None if len(valid) == T else rows.flatten()[valid])

    def of(self, windows: Tensor) -> Tensor:
        """The valid rows of [N, first, ...], flattened."""
        flat = windows.flatten(0, 1)
        return flat if self.valid is None else flat[self.valid]


def forward(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """See `short_convolution`; the outputs come in parts."""
    B, T, _ = inputs.x.shape
    parts = [inputs.x.new_empty(shape) for shape in inputs.part_shapes()]
    if B * T == 0:
        return parts, inputs.tail.clone(memory_format=torch.contiguous_format)
    taps = inputs.weight.to(inputs.compute_dtype).squeeze(1).t().contiguous()
    starts = Starts.build(inputs)
    outputs = [part.view(B * T, part.shape[2], part.shape[3]) for part in parts]
    if starts.rows is None:
        _finish(starts.of(_correlate(starts.window, taps)), inputs, outputs)
        return parts, _new_tail(inputs)
    flat = inputs.x.flatten(0, 1)
    for start, end in _blocks(inputs):
        x = flat[start - inputs.reach : end].to(inputs.compute_dtype)
        _finish(_correlate(x, taps), inputs, [output[start:end] for output in outputs])
    if inputs.reach:
        z = starts.of(_correlate(starts.window, taps))
        firsts = [output.new_empty(len(z), *output.shape[1:]) for output in outputs]
        _finish(z, inputs, firsts)
        for output, first in zip(outputs, firsts, strict=True):
            output.index_copy_(0, starts.rows, first)
    return parts, _new_tail(inputs)


def backward(
    inputs: Inputs, dparts: list[Tensor], dnew_tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and tail from those of the parts and of the new tails."""
    B, T, D = inputs.x.shape
    reach, dtype = inputs.reach, inputs.compute_dtype
    taps = inputs.weight.to(dtype).squeeze(1).t().contiguous()
    dtaps = torch.zeros_like(taps)
    dx = torch.empty(B * T, D, dtype=dtype, device=inputs.x.device)
    dtail = torch.zeros_like(inputs.tail, dtype=dtype, memory_format=torch.contiguous_format)
    if B * T:
        starts = Starts.build(inputs)
        dparts = [dpart.flatten(0, 1) for dpart in dparts]
        if starts.rows is not None:
            _backward_blocks(inputs, starts.rows, taps, dparts, dx, dtaps)
        if reach:
            _backward_starts(inputs, starts, taps, dparts, dx, dtaps, dtail)
    _backward_new_tail(inputs, dnew_tail.to(dtype), dx, dtail)
    return (
        dx.view_as(inputs.x).to(inputs.x.dtype),
        dtaps.t().unsqueeze(1).to(inputs.weight.dtype).contiguous(),
        dtail.to(inputs.tail.dtype),
    )


def _backward_blocks(
    inputs: Inputs,
    rows: Tensor,
    taps: Tensor,
    dparts: list[Tensor],
    dx: Tensor,
    dtaps: Tensor,
) -> None:
    """Write to dx [total, D], and add to dtaps [W, D], what the outputs outside the starts send."""
    flat, reach = inputs.x.flatten(0, 1), inputs.reach
    reverse = taps.flip(0)
    blocks = list(_blocks(inputs))
    edges = torch.tensor([start for start, _ in blocks] + [len(flat)], device=flat.device)
    edges = torch.searchsorted(rows, edges).tolist()
    before = dx.new_zeros(reach, dx.shape[1])  # gradients of the `reach` outputs before the block
    for i, (start, end) in enumerate(blocks):
        x = flat[start - reach : end].to(dx.dtype)
        dz = _unfinish(_correlate(x, taps), inputs, [dpart[start:end] for dpart in dparts])
        dz.index_fill_(0, rows[edges[i] : edges[i + 1]] - start, 0)
        _accumulate_taps(dtaps, x, dz)
        seen = torch.cat((before, dz))
        _correlate(seen, reverse, out=dx[start - reach : end - reach])
        before = seen[end - start :].clone()
    if reach:
        _correlate(F.pad(before, (0, 0, 0, reach)), reverse, out=dx[-reach:])


def _backward_starts(
    inputs: Inputs,
    starts: Starts,
    taps: Tensor,
    dparts: list[Tensor],
    dx: Tensor,
    dtaps: Tensor,
    dtail: Tensor,
) -> None:
    """Write to dtail, write or add to dx [total, D], add to dtaps [W, D] what the starts send."""
    reach = inputs.reach
    z = _correlate(starts.window, taps)
    firsts = dparts if starts.rows is None else [dpart[starts.rows] for dpart in dparts]
    dfirst = _unfinish(starts.of(z), inputs, firsts)
    if starts.valid is None:
        dz = dfirst.view_as(z)
    else:
        dz = torch.zeros_like(z)
        dz.view(-1, z.shape[2])[starts.valid] = dfirst
    _accumulate_taps(dtaps, starts.window, dz)
    if dz.shape[1] == 1:
        dwindow = dz * taps
    else:
        dwindow = _correlate(F.pad(dz, (0, 0, reach, reach)), taps.flip(0))
    dtail.copy_(dwindow[:, :reach])
    if starts.rows is None:
        dx.copy_(starts.of(dwindow[:, reach:]))
    else:
        dx.index_add_(0, starts.rows, starts.of(dwindow[:, reach:]))


def _blocks(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """Stretches [start, end) of the tokens that have `reach` tokens before them."""
    B, T, D = inputs.x.shape
    size = B * T
    if inputs.x.device.type == "cpu":
        size = max(16 * inputs.reach, BLOCK_CPU * torch.get_num_threads() // D, 1)
    for start in range(inputs.reach, B * T, size):
        yield start, min(start + size, B * T)


def _correlate(x: Tensor, taps: Tensor, out: Tensor | None = None) -> Tensor:
    """out[..., t, :] = sum_j taps[j] x[..., t + j, :]; shorter than x by len(taps) - 1."""
    length = x.shape[-2] - len(taps) + 1
    if length == 1 and out is None:
        return (x * taps).sum(-2, keepdim=True)
    out = torch.mul(x.narrow(-2, 0, length), taps[0], out=out)
    for j in range(1, len(taps)):
        out.addcmul_(x.narrow(-2, j, length), taps[j])
    return out


def _accumulate_taps(dtaps: Tensor, x: Tensor, dz: Tensor) -> None:
    """dtaps[j] += sum_t x[..., t + j, :] dz[..., t, :]."""
    if dz.shape[-2] == 1:
        dtaps += (x * dz).view(-1, *dtaps.shape).sum(0)
        return
    product = torch.empty_like(dz)
    for j in range(len(dtaps)):
        torch.mul(x.narrow(-2, j, dz.shape[-2]), dz, out=product)
        dtaps[j] += product.flatten(0, -2).sum(0)


def _inverse_length(heads: Tensor) -> Tensor:
    """Of heads [tokens, heads, head_dim], with 1 as the last dimension."""
    return heads.square().sum(-1, keepdim=True).add_(L2_NORM_EPS).rsqrt_()


def _finish(z: Tensor, inputs: Inputs, outputs: list[Tensor]) -> None:
    """Activation and norm of z [tokens, D], written to outputs [tokens, heads, head_dim]."""
    columns = z.split([part.width for part in inputs.parts], 1)
    for part, column, output in zip(inputs.parts, columns, outputs, strict=True):
        if inputs.silu and not part.normalize and output.dtype == z.dtype:
            torch.ops.aten.silu.out(column.view_as(output), out=output)
            continue
        heads = (F.silu(column, inplace=True) if inputs.silu else column).view_as(output)
        if part.normalize:
            torch.mul(heads, _inverse_length(heads), out=output)
        else:
            output.copy_(heads)


def _unfinish(z: Tensor, inputs: Inputs, dparts: list[Tensor]) -> Tensor:
    """The gradient of z [tokens, D] from those of what `_finish` makes of it."""
    a = F.silu(z) if inputs.silu else z
    columns = a.split([part.width for part in inputs.parts], 1)
    pieces = []
    for part, column, dpart in zip(inputs.parts, columns, dparts, strict=True):
        dpart = dpart.to(z.dtype)
        if part.normalize:
            heads = column.unflatten(1, (part.heads, part.head_dim))
            scale = _inverse_length(heads)
            y = heads * scale
            along = (y * dpart).sum(-1, keepdim=True)
            dpart = dpart.addcmul(y, along, value=-1).mul_(scale)
        pieces.append(dpart.flatten(1))
    if not inputs.silu:
        return torch.cat(pieces, 1)  # never a view of the incoming gradient
    da = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return torch.ops.aten.silu_backward(da, z)


def _new_tail(inputs: Inputs) -> Tensor:
    """The last `reach` inputs of every sequence, in a storage of their own."""
    _, T, D = inputs.x.shape
    reach = inputs.reach
    if inputs.cu_seqlens is None:
        if reach > T:
            return torch.cat((inputs.tail[:, T:], inputs.x), 1)
        return inputs.x[:, T - reach :].clone(memory_format=torch.contiguous_format)
    rows, own, slots = _tail_places(inputs)
    from_x = inputs.x[0, rows]
    return torch.where(own, from_x, inputs.tail.gather(1, slots.expand(-1, -1, D)))


def _tail_places(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Where packed new tails come from, [N, reach] tokens, [N, reach, 1] whether from one at all,
    and [N, reach, 1] the place in the old tail otherwise."""
    reach = inputs.reach
    starts, ends = inputs.cu_seqlens[:-1, None].long(), inputs.cu_seqlens[1:, None].long()
    steps = torch.arange(reach, device=starts.device)
    rows = ends - reach + steps
    slots = (ends - starts + steps).clamp(max=max(reach - 1, 0))
    return rows.clamp(min=0), (rows >= starts)[..., None], slots[..., None]


def _backward_new_tail(inputs: Inputs, dnew_tail: Tensor, dx: Tensor, dtail: Tensor) -> None:
    """Add what the new tails send to dx [total, D] and dtail."""
    B, T, D = inputs.x.shape
    reach = inputs.reach
    if inputs.cu_seqlens is None:
        kept = min(reach, T)
        dx.view(B, T, D)[:, T - kept :] += dnew_tail[:, reach - kept :]
        dtail[:, kept:] += dnew_tail[:, : reach - kept]
        return
    rows, own, slots = _tail_places(inputs)
    if T:
        dx.index_add_(0, rows.flatten(), torch.where(own, dnew_tail, 0).flatten(0, 1))
    dtail.scatter_add_(1, slots.expand(-1, -1, D), torch.where(own, 0, dnew_tail))
