"""The lanes that may hide a result are looked through again, key by key.

With L lanes about k^2 / 2L of a query's are: the number of pairs of results that share a lane.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.topk_search.triton_problem import Queries, Store, Tiles

LEAST, LAST = -(2**63), 2**31 - 1
MOST_KEYS = 1 / 64  # of all pairs of a query and a key: above it, eager searches anew
NUMBERS = 1 << 24  # that are multiplied or merged at a time


def pack(scores: Tensor, places: Tensor) -> Tensor:
    """int64 that order by score and then by lowest place, as `sort_key` makes them; LEAST for a
    score of -inf or NaN."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & LAST)
    packed = (ordered.long() << 32) | (places ^ LAST)
    return packed.masked_fill_(~(scores > -torch.inf), LEAST)


def scores_and_places(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What was packed; -inf and -1 for LEAST."""
    ordered = (packed >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & LAST)).view(torch.float32)
    nothing = packed == LEAST
    places = ((packed & LAST) ^ LAST).masked_fill_(nothing, -1)
    return scores.masked_fill_(nothing, -torch.inf), places


def repair(
    best: Tensor, limit: Tensor, asked: Queries, store: Store, tiles: Tiles, k: int
) -> Tensor | None:
    """The k best packed keys of every query, int64 [B, T, k], sorted; LEAST where there are none.

    best, limit: of every lane, [B, T, lanes]: see `lanes_kernel`. None where so many lanes are
    doubtful that a search of everything costs less.
    """
    batch, tokens, lanes = best.shape
    found, lane = best.flatten(0, 1).topk(min(k, lanes))
    found = F.pad(found, (0, k - found.shape[1]), value=LEAST)
    doubtful = limit.flatten(0, 1) > found[:, -1:]
    pairs = doubtful.nonzero()
    if len(pairs) == 0:
        return found.unflatten(0, (batch, tokens))
    pair_keys = batch * tokens * store.keys.shape[1]
    if len(pairs) * tiles.per_split > MOST_KEYS * pair_keys:
        return None
    size = max(1, NUMBERS // (tiles.per_split * store.keys.shape[2]))
    anew = [_look_through(part, asked, store, tiles, k) for part in pairs.split(size)]
    # The first results without those of doubtful lanes, and what these have.
    query, counts = pairs[:, 0].unique_consecutive(return_counts=True)
    rest = found[query, : lane.shape[1]]
    rest = rest.masked_fill(doubtful[query].gather(1, lane[query]), LEAST)
    found[query] = _merge(rest, torch.cat(anew), counts, k)
    return found.unflatten(0, (batch, tokens))


def _merge(rest: Tensor, anew: Tensor, counts: Tensor, k: int) -> Tensor:
    """The k best [Q, k] of rest [Q, n] and of the next counts[q] rows of anew for each q."""
    most, width = int(counts.max()), anew.shape[1]
    begins = counts.cumsum(0) - counts
    rank = torch.arange(most, device=anew.device)
    merged = []
    for part in torch.arange(len(rest), device=anew.device).split(
        max(1, NUMBERS // (most * width))
    ):
        row = (begins[part, None] + rank).clamp_(max=len(anew) - 1)
        more = anew[row].masked_fill_((rank >= counts[part, None])[..., None], LEAST)
        both = torch.cat((rest[part], more.flatten(1)), 1)
        merged.append(F.pad(both, (0, max(0, k - both.shape[1])), value=LEAST).topk(k).values)
    return torch.cat(merged)


def _look_through(pairs: Tensor, asked: Queries, store: Store, tiles: Tiles, k: int) -> Tensor:
    """The best packed keys [P, min(k, per_split)] of lanes; pairs [P, 2]: query and lane."""
    query, lane = pairs.unbind(1)
    tokens, stored = asked.parts.shape[2], store.keys.shape[1]
    row = query // tokens
    split, column = lane // tiles.block_n, lane % tiles.block_n
    tile = split[:, None] * tiles.per_split + torch.arange(tiles.per_split, device=lane.device)
    key = tile * tiles.block_n + column[:, None]  # [P, per_split]
    shown = key < stored
    key.clamp_(max=stored - 1)
    row = row[:, None]
    vectors = asked.parts.flatten(1, 2)[:, query].float().sum(0)  # [P, D]
    scores = (store.keys[row, key].float() * vectors[:, None]).sum(-1)
    if store.twice:
        scores *= 2
    if asked.factors is not None:
        scores *= asked.factors.flatten()[query, None]
    if store.factors is not None:
        scores *= store.factors[row, key]
    if store.offsets is not None:
        scores += store.offsets[row, key]
    if store.valid is not None:
        shown &= store.valid[row, key]
    if store.key_positions is not None:
        position = store.key_positions[row, key]
        shown &= position >= asked.first.flatten()[query, None]
        shown &= position < asked.last.flatten()[query, None]
    packed = pack(scores, key).masked_fill_(~shown, LEAST)
    return packed.topk(min(k, tiles.per_split)).values
