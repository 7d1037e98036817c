"""Exchanges of rows between the processes that share a table, as many as each process has.

Every function is a collective: all processes of the group call it, in the same order. What a
process gets is ordered by the rank that it came from, so that sums over it are the same every
time. Plain collectives of torch.distributed: gloo on a CPU, NCCL on GPUs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from memlm.cuda import Reads


def all_counts(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """What `count` is on every process."""
    return _all_rows(torch.tensor([[count]], device=device), group).flatten().tolist()


def all_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes one after another.

    Args:
        rows: [counts[rank], ...].
        counts: rows of every process, see `all_counts`.
    """
    longest = max(counts)
    if len(rows) < longest:
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        padded = torch.cat([rows, padding])
    else:
        padded = rows.contiguous()
    gathered = _all_rows(padded, group)
    if min(counts) == longest:
        return gathered
    parts = gathered.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`all_rows` where every process has as many."""
    gathered = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    dist.all_gather(list(gathered.tensor_split(dist.get_world_size(group))), rows, group=group)
    return gathered


def exchange(
    numbers: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send every process its part of `numbers`.

    Args:
        numbers: [sum(sent), ...], parts of sent[rank] rows one after another.
        received: rows that come from every process; its sent[own rank].

    Returns:
        [sum(received), ...], by sender.
    """
    out = numbers.new_empty(sum(received), *numbers.shape[1:])
    dist.all_to_all_single(out, numbers.contiguous(), list(received), list(sent), group=group)
    return out


def all_gather_reads(reads: Sequence[Reads], group: dist.ProcessGroup) -> list[Reads]:
    """The reads of all processes, by rank; every process gets the same list.

    The processes may have different numbers of reads, of tokens per read and of bytes per number;
    the widest numbers are taken.

    Args:
        reads: at least one, which may be empty; all for one table.
    """
    indices, weights, grad = (
        [getattr(part, name) for part in reads] for name in ("indices", "weights", "grad")
    )
    sizes = [max(x.element_size() for x in kind) for kind in (indices, weights, grad)]
    device = grad[0].device
    header = _all_rows(torch.tensor([[len(reads), *sizes]], device=device), group)
    counts, *sizes = header.T.tolist()
    shapes = torch.tensor([part.shape for part in indices], device=device)
    shapes = all_rows(shapes, counts, group)
    by_rank = [part.tolist() for part in shapes.split(counts)]
    tokens = [sum(t for t, _ in part) for part in by_rank]
    numbers = [sum(t * bag for t, bag in part) for part in by_rank]
    all_indices = all_rows(_joined([x.flatten() for x in indices], sizes[0]), numbers, group)
    all_weights = all_rows(_joined([x.flatten() for x in weights], sizes[1]), numbers, group)
    all_grads = all_rows(_joined(grad, sizes[2]), tokens, group)

    joined, read, token = [], 0, 0
    for t, bag in (shape for part in by_rank for shape in part):
        bags = slice(read, read + t * bag)
        joined.append(
            Reads(
                all_indices[bags].view(t, bag),
                all_weights[bags].view(t, bag),
                all_grads[token : token + t],
            )
        )
        read, token = read + t * bag, token + t
    return joined


def _joined(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The parts one after another, in numbers as wide as the widest process has."""
    joined = torch.cat(list(parts))
    if joined.element_size() == max(sizes):
        return joined
    wider = {4: torch.float32, 8: torch.float64 if joined.is_floating_point() else torch.int64}
    return joined.to(wider[max(sizes)])
