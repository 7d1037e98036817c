"""The lanes that may hide a result are looked through again, key by key.

With L lanes about k^2 / 2L of a query's are: the number of pairs of results that share a lane.
"""

import torch
from torch import Tensor

from memlm.cuda.topk_search.triton_problem import Queries, Store, Tiles

LEAST, LAST = -(2**63), 2**31 - 1
MOST_KEYS = 1 / 16  # of all pairs of a query and a key: above it, eager searches anew
NUMBERS = 1 << 24  # that are multiplied at a time


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
    """The k best packed keys of every query, int64 [B, T, min(k, lanes)], sorted.

    best, limit: of every lane, [B, T, lanes]: see `lanes_kernel`. None where so many lanes are
    doubtful that a search of everything costs less.
    """
    batch, tokens, lanes = best.shape
    found, lane = best.flatten(0, 1).topk(min(k, lanes))
    worst = found[:, -1:] if k <= lanes else torch.full_like(found[:, -1:], LEAST)
    doubtful = limit.flatten(0, 1) > worst
    pairs = doubtful.nonzero()
    if len(pairs) == 0:
        return found.unflatten(0, (batch, tokens))
    pair_keys = batch * tokens * store.keys.shape[1]
    if len(pairs) * tiles.per_split > MOST_KEYS * pair_keys:
        return None
    rows, which, counts = pairs[:, 0].unique_consecutive(return_inverse=True, return_counts=True)
    size = max(1, NUMBERS // (tiles.per_split * store.keys.shape[2]))
    anew = [_look_through(part, asked, store, tiles, k) for part in pairs.split(size)]
    anew = torch.cat(anew)
    place = torch.arange(len(pairs), device=best.device) - (counts.cumsum(0) - counts)[which]
    most = int(counts.max())
    gathered = anew.new_full((len(rows), most, anew.shape[1]), LEAST)
    gathered[which, place] = anew
    kept = found[rows].masked_fill_(doubtful[rows].gather(1, lane[rows]), LEAST)
    merged = torch.cat((kept, gathered.flatten(1)), 1)
    found[rows] = merged.topk(found.shape[1]).values
    return found.unflatten(0, (batch, tokens))


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
