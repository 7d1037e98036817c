"""The search of a corpus store: exact over its parts, or through an index over the first ones."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import topk_search
from memlm.cuda.ordered_topk import ordered_topk
from memlm.errors import UserError
from memlm.retrieval.choice import (
    SAMPLE,
    Found,
    choose_engine,
    create_engine,
    load_engine,
    recall_of,
)
from memlm.retrieval.corpus_layout import CorpusLayout, Part, cut
from memlm.retrieval.engine import RetrievalEngine
from memlm.retrieval.faiss_engines import FaissIvfEngine

_DEVICE_BLOCK = 1 << 26  # bytes of keys sent to another device at a time
_TRAINING_KEYS = 1 << 18  # the most keys from which centroids are made
_ADDED = 1 << 16  # entries handed to an engine at a time
_RECALL_AT = 32
logger = logging.getLogger(__name__)


def search_parts(
    queries: Tensor, parts: Iterable[Part], k: int, metric: str, hidden: Tensor | None
) -> Found:
    """The k best entries of every query, exactly; keys go to the queries' device in blocks.

    Args:
        queries: [N, key_size].
        parts: in the order of their ids.
        k: results per query.
        metric: see `memlm.cuda.topk_search`.
        hidden: bool [entries], those that may not be found; None = none.
    """
    none = topk_search(queries[None], queries.new_zeros(1, 0, queries.shape[1]), k, metric)
    best = none[0][0], none[1][0]
    for part in parts:
        keys = part.columns["keys"]
        size = len(part)
        if queries.device.type != "cpu":
            size = _DEVICE_BLOCK // (keys.shape[1] * keys.itemsize)
        for block in cut(part, max(size, 1)):
            options = {}
            if "scales" in block.columns:
                options["scales"] = block.columns["scales"][None].to(queries.device)
            if hidden is not None:
                options["valid"] = ~hidden[None, block.ids].to(queries.device)
            keys = block.columns["keys"][None].to(queries.device)
            scores, index = topk_search(queries[None], keys, k, metric, **options)
            ids = torch.where(index >= 0, index + block.first, -1)
            best = merge(best, (scores[0], ids[0]))
    return best


def merge(one: Found, other: Found) -> Found:
    """The best of both; those of `one` have the lower ids, and win among equal scores."""
    scores, order = ordered_topk(torch.cat((one[0], other[0]), -1), one[0].shape[-1])
    return scores, torch.cat((one[1], other[1]), -1).gather(-1, order)


def build_index(
    name: str,
    parts: Sequence[Part],
    layout: CorpusLayout,
    hidden: Tensor | None,
    queries: Tensor | None,
) -> tuple[RetrievalEngine | None, float]:
    """An engine over all entries, None where exact search is chosen, and its recall, also logged.

    Args:
        name: an engine of `memlm.retrieval.choice`, or "auto".
        parts: all entries.
        layout: of the store.
        hidden: bool [entries], those to leave out; None = none.
        queries: [N, key_size], a sample of those to come; None = some of the keys.
    """
    kept = torch.arange(sum(len(part) for part in parts))
    if hidden is not None:
        kept = kept[~hidden]
    if name == "auto":
        name = choose_engine(len(kept), static=True)
    engine = None if name == "exact" else create_engine(name, layout.key_size, layout.metric)
    if engine is None or not len(kept):
        logger.info("retrieval: exact, %d entries", len(kept))
        return None, 1.0
    if isinstance(engine, FaissIvfEngine):
        engine.train(_keys_at(parts, _spread(kept, _TRAINING_KEYS)), len(kept))
    for ids in kept.split(_ADDED):
        engine.add(_keys_at(parts, ids), ids)
    sample = _keys_at(parts, _spread(kept, SAMPLE)) if queries is None else queries
    best = search_parts(sample, parts, _RECALL_AT, layout.metric, hidden)
    recall = recall_of(best, engine.search(sample, _RECALL_AT))
    kind = "keys" if queries is None else "queries"
    logger.info(
        "retrieval: %s, %d entries, recall@%d %.4f of %d %s",
        *(name, len(kept), _RECALL_AT, recall, len(sample), kind),
    )
    return engine, recall


def open_index(
    folder: Path, wanted: str, found: str | None, verify: bool
) -> RetrievalEngine | None:
    """The index that a search is to use; None = exact search.

    Args:
        folder: of the store.
        wanted: "exact", "auto" (the index, if there is one) or the name of an engine.
        found: folder of the store's index within `folder`; None = it has none.
        verify: whether every byte is read and verified.

    Raises:
        UserError: when the store has no such index, or its files are damaged.
    """
    if wanted == "exact" or (wanted == "auto" and found is None):
        return None
    engine = None if found is None else load_engine(folder / found, memory_map=True, verify=verify)
    if engine is None or wanted not in ("auto", engine.name):
        has = "no index" if engine is None else f"an index of {engine.name}"
        raise UserError(
            f"{folder}: has {has}, not one of {wanted!r}; make one with --engine of "
            "memlm.memory.build_store or CorpusStore.build_index"
        )
    return engine


def take_rows(parts: Sequence[Part], column: str, ids: Tensor) -> Tensor:
    """Rows of a column at `ids` (int64 [N]); -1 reads as zeros."""
    source = parts[0].columns[column]
    taken = source.new_zeros(len(ids), *source.shape[1:])
    ordered, order = ids.sort()
    firsts = torch.tensor([part.first for part in parts])
    bounds = [*torch.searchsorted(ordered, firsts).tolist(), len(ids)]
    for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
        if start < stop:
            rows = ordered[start:stop] - part.first
            taken[order[start:stop]] = part.columns[column][rows]
    return taken


def _keys_at(parts: Sequence[Part], ids: Tensor) -> Tensor:
    """Keys float32 [N, key_size]."""
    keys = take_rows(parts, "keys", ids).float()
    if "scales" in parts[0].columns:
        keys *= take_rows(parts, "scales", ids)[:, None]
    return keys


def _spread(ids: Tensor, count: int) -> Tensor:
    """At most `count` ids, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]
