"""Which engine searches a store."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import topk_search
from memlm.cuda.topk_search import Metric
from memlm.errors import UserError, nearest
from memlm.retrieval.engine import RetrievalEngine, read_engine_manifest
from memlm.retrieval.exact_engine import ExactEngine
from memlm.retrieval.faiss_engines import FaissFlatEngine, FaissHnswEngine, FaissIvfEngine

EXACT_LIMIT = 262_144  # entries up to which exact search costs no more than the others
SAMPLE = 256  # queries of which recall is measured
ROUNDING = 1e-6  # scores that differ by less than this part of them are equal
Found = tuple[Tensor, Tensor]  # scores float32 [N, k] and ids int64 [N, k]

ENGINES: dict[str, type[RetrievalEngine]] = {
    engine.name: engine
    for engine in (ExactEngine, FaissFlatEngine, FaissIvfEngine, FaissHnswEngine)
}
logger = logging.getLogger(__name__)


def choose_engine(entries: int, static: bool) -> str:
    """The engine that "auto" stands for.

    Args:
        entries: of one store.
        static: whether entries neither come nor go. Where they do, the centroids of an inverted
            file would soon be those of other keys.
    """
    return "faiss_ivf" if static and entries > EXACT_LIMIT else "exact"


def create_engine(name: str, dim: int, metric: Metric = "dot", **options) -> RetrievalEngine:
    """An engine without entries.

    Args:
        name: exact, faiss_flat, faiss_ivf or faiss_hnsw.
        dim: channels of a vector.
        metric: dot, cosine or l2.
        options: of the engine's class.

    Raises:
        UserError: for an unknown name, or options that do not fit.
    """
    _check_name(name, ENGINES)
    try:
        return ENGINES[name](dim, metric, **options)
    except TypeError as error:
        raise UserError(f"{name}: {str(error).split('__init__() ')[-1]}") from error


def build_engine(
    name: str,
    keys: Tensor,
    ids: Tensor | None = None,
    *,
    metric: Metric = "dot",
    static: bool = True,
    queries: Tensor | None = None,
    k: int = 32,
    **options,
) -> RetrievalEngine:
    """An engine with entries; what "auto" took, and its recall, is logged.

    Args:
        name: "auto" (see `choose_engine`) or an engine's name.
        keys: [M, dim].
        ids: int64 [M]; None = 0 .. M - 1.
        metric: dot, cosine or l2.
        static: whether entries neither come nor go.
        queries: [N, dim], a sample of those to come, with which the recall of an engine that is
            not exact is measured; None = some of the keys, each of which finds itself.
        k: results per query in that measurement.
        options: of the engine's class.

    Raises:
        UserError: for an unknown name, or keys, ids or options that do not fit.
    """
    _check_name(name, ("auto", *ENGINES))
    if keys.ndim != 2:
        raise UserError(f"build_engine: keys must be [M, dim], not {list(keys.shape)}")
    chosen = choose_engine(len(keys), static) if name == "auto" else name
    engine = create_engine(chosen, keys.shape[1], metric, **options)
    engine.add(keys, ids)
    found = "exact" if engine.exact else "recall not measured"
    if not engine.exact and len(engine):
        sample = _sample(keys if queries is None else queries)
        recall = measure_recall(engine, keys, ids, sample, k)
        found = (
            f"recall@{k} {recall:.4f} of {len(sample)} {'keys' if queries is None else 'queries'}"
        )
    logger.info("retrieval: %s, %d entries, %s", chosen, len(engine), found)
    return engine


def measure_recall(
    engine: RetrievalEngine, keys: Tensor, ids: Tensor | None, queries: Tensor, k: int
) -> float:
    """The share of the k best entries that the engine finds, in [0, 1]; see `recall_of`.

    Args:
        engine: that holds the entries, in float32.
        keys, ids: its entries, as they were added.
        queries: [N, dim], N > 0.
        k: results per query.
    """
    best, places = topk_search(queries[None].float(), keys[None], min(k, len(keys)), engine.metric)
    best_ids = places[0] if ids is None else ids.to(places.device)[places[0]]
    return recall_of((best[0], best_ids), engine.search(queries, k))


def recall_of(best: Found, found: Found) -> float:
    """The share of the best entries that were found, in [0, 1].

    An entry that scores like the last of the best counts as one of them: where a corpus repeats
    itself, which of many copies are the best is a matter of rounding.

    Args:
        best: scores and ids [N, k] of an exact search, -inf and -1 where there are fewer.
        found: scores and ids [N, K] of the search that is judged.
    """
    there = best[0] > -torch.inf
    last = best[0].masked_fill(~there, torch.inf).amin(1, keepdim=True)
    right = (found[1][:, :, None] == best[1][:, None]).any(-1)
    right |= found[0] >= last - ROUNDING * last.abs()
    right &= found[1] >= 0
    return float(right.sum(1).minimum(there.sum(1)).sum() / there.sum())


def load_engine(
    folder: str | Path, *, memory_map: bool = False, verify: bool = True
) -> RetrievalEngine:
    """The engine that was saved in a folder, of whatever class; see `RetrievalEngine.load`."""
    name = read_engine_manifest(Path(folder))["engine"]
    _check_name(name, ENGINES)
    return ENGINES[name].load(folder, memory_map=memory_map, verify=verify)


def _sample(rows: Tensor) -> Tensor:
    """At most SAMPLE rows, evenly spread."""
    places = torch.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).long()
    return rows[places.to(rows.device)]


def _check_name(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(
            f"no retrieval engine {name!r}{nearest(name, known)} (valid: {', '.join(known)})"
        )
