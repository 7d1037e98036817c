"""Engines of faiss: another exact one, and two that trade recall for speed.

faiss is imported when an engine is made. Its indices are kept in the safetensors shards of a store;
a memory-mapped one reads them where they lie. Writing to such an index would abort the process, so
it is refused before faiss sees it.
"""

import math
from abc import abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.topk_search import Metric
from memlm.errors import UserError
from memlm.retrieval.engine import RetrievalEngine
from memlm.retrieval.manifest import Content, Shard, write_shard

POINTS_PER_LIST = 39  # fewer training vectors per centroid than this and faiss itself warns


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise UserError("this engine needs faiss: pip install faiss-cpu") from error
    return faiss


class FaissEngine(RetrievalEngine):
    """An index of faiss whose entries keep their ids. On the CPU, float32."""

    def __init__(self, dim: int, metric: Metric = "dot"):
        super().__init__(dim, metric)
        self._index = self._new_index()
        self._mapped: Tensor | None = None  # what a memory-mapped index reads

    @property
    def nbytes(self) -> int:
        """Bytes of the index and of the ids beside it."""
        return self._index_bytes() + 8 * len(self) + self.ids.nbytes

    @property
    def faiss_metric(self) -> int:
        """The metric's number in faiss; a cosine is the product of normalised vectors."""
        faiss = _faiss()
        return faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT

    @abstractmethod
    def _new_index(self) -> Any:
        """An empty index with ids."""

    @abstractmethod
    def _index_bytes(self) -> int:
        """Bytes of vectors and of what is built over them, without the ids."""

    @classmethod
    def _empty(cls, content: Content) -> Self:
        return cls(content["dim"], content["metric"], **content["options"])

    def _options(self) -> dict[str, Any]:
        return {"dtype": "float32", "faiss": _faiss().__version__, "options": self._settings()}

    def _settings(self) -> dict[str, Any]:
        """Arguments of the constructor beside dim and metric."""
        return {}

    def _vectors(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to("cpu", torch.float32)
        return (F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors).contiguous()

    def _entries(self, keys: Tensor) -> Tensor:
        """Keys as faiss gets them. A number that overflows inside of it ends the process."""
        vectors = keys.to("cpu", torch.float32)
        if not vectors.square().sum(1).isfinite().all():
            raise UserError(f"{self.name}: keys are too large, their squares overflow float32")
        return self._vectors(vectors)

    def _add(self, keys: Tensor, ids: Tensor) -> None:
        self._index.add_with_ids(self._entries(keys).numpy(), ids.numpy())

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        vectors = self._vectors(queries)
        found = self._index.search(vectors.numpy(), k)
        scores, ids = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        if self.metric == "l2":  # from |q - k|^2
            scores = vectors.square().sum(1, keepdim=True) - scores
        scores = scores.masked_fill(ids < 0, -torch.inf)
        # Of equal scores the lowest id first; which ones are among the k is up to faiss.
        ids, order = ids.sort(1)
        scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        return scores, ids.gather(1, best)

    def _remove(self, ids: Tensor, keep: Tensor) -> None:
        self._index.remove_ids(ids.numpy())

    def _write(self, folder: Path, number: int) -> list[Shard]:
        faiss = _faiss()
        writer = faiss.VectorIOWriter()
        faiss.write_index(self._index, writer)
        # A view of what faiss wrote, without another copy.
        data = torch.from_numpy(faiss.rev_swig_ptr(writer.data.data(), writer.data.size()))
        return [write_shard(folder, number, {"ids": self.ids, "index": data}, len(self))]

    def _read(self, pieces: list[dict[str, Tensor]], content: Content) -> None:
        faiss = _faiss()
        data = pieces[0]["index"]
        try:
            if self.read_only:
                self._mapped = data
                reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(data.numpy()), data.numel())
                self._index = faiss.read_index(reader)
            else:
                self._index = faiss.deserialize_index(data.numpy())
        except RuntimeError as error:
            raise UserError(
                f"{self.name}: faiss {faiss.__version__} cannot read an index that faiss "
                f"{content['faiss']} wrote"
            ) from error


class FaissFlatEngine(FaissEngine):
    """faiss' own comparison of every entry with every query.

    Of entries with the k-th best score, which ones are found is up to faiss.
    """

    name: ClassVar[str] = "faiss_flat"
    exact: ClassVar[bool] = True

    def _new_index(self) -> Any:
        faiss = _faiss()
        return faiss.IndexIDMap(faiss.IndexFlat(self.dim, self.faiss_metric))

    def _index_bytes(self) -> int:
        return 4 * self.dim * len(self)


class FaissHnswEngine(FaissEngine):
    """A graph of neighbours (Malkov and Yashunin 2016, arXiv:1603.09320). It cannot remove.

    Args:
        dim: channels of a vector.
        metric: dot, cosine or l2.
        links: neighbours of an entry on each level, twice as many on the lowest.
        ef_construction: candidates kept while an entry is linked.
        ef_search: candidates kept while a query is answered; at least k are.
    """

    name: ClassVar[str] = "faiss_hnsw"
    exact: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        metric: Metric = "dot",
        links: int = 16,
        ef_construction: int = 40,
        ef_search: int = 128,
    ):
        options = {"links": links, "ef_construction": ef_construction, "ef_search": ef_search}
        _check_positive(self.name, options)
        self.links, self.ef_construction, self.ef_search = options.values()
        super().__init__(dim, metric)

    def _new_index(self) -> Any:
        faiss = _faiss()
        index = faiss.IndexHNSWFlat(self.dim, self.links, self.faiss_metric)
        index.hnsw.efConstruction = self.ef_construction
        return faiss.IndexIDMap(index)

    def _settings(self) -> dict[str, Any]:
        return {
            "links": self.links,
            "ef_construction": self.ef_construction,
            "ef_search": self.ef_search,
        }

    def _index_bytes(self) -> int:
        graph = _faiss().downcast_index(self._index.index).hnsw
        links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        return 4 * self.dim * len(self) + links

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss = _faiss()
        graph = faiss.downcast_index(self._index.index).hnsw
        graph.efSearch = max(self.ef_search, k)
        return super()._search(queries, k)

    def remove(self, ids: Tensor) -> None:
        """Raise UserError: the graph has no way to leave an entry out."""
        raise UserError(
            "faiss_hnsw: cannot remove entries; use exact, faiss_flat or faiss_ivf where entries go"
        )

    def _remove(self, ids: Tensor, keep: Tensor) -> None:
        self.remove(ids)


class FaissIvfEngine(FaissEngine):
    """Entries in lists by the nearest of `nlist` centroids; a query reads the `nprobe` nearest.

    The centroids come from the first keys added, or from `train`. Keys that drift away from them
    cost recall.

    Args:
        dim: channels of a vector.
        metric: dot, cosine or l2.
        nlist: centroids; None = four times the root of the number of entries, as far as there are
            39 training keys for each.
        nprobe: lists read per query; None = a sixteenth of them, at least 32.
    """

    name: ClassVar[str] = "faiss_ivf"
    exact: ClassVar[bool] = False

    def __init__(
        self, dim: int, metric: Metric = "dot", nlist: int | None = None, nprobe: int | None = None
    ):
        options = {"nlist": nlist, "nprobe": nprobe}
        _check_positive(self.name, {key: n for key, n in options.items() if n is not None})
        self.nlist, self.nprobe = nlist, nprobe
        super().__init__(dim, metric)

    def train(self, keys: Tensor, entries: int | None = None) -> None:
        """Place the centroids, before anything is added.

        Args:
            keys: [N, dim], like those that will be added.
            entries: how many will be added in all; None = N.

        Raises:
            UserError: when there are entries already, or too few keys.
        """
        self._check_vectors(keys, "keys")
        if len(self):
            raise UserError("faiss_ivf: has entries already; train before the first is added")
        faiss = _faiss()
        most = len(keys) // POINTS_PER_LIST
        nlist = self.nlist or max(1, min(most, round(4 * math.sqrt(entries or len(keys)))))
        if nlist > most:
            raise UserError(
                f"faiss_ivf: {len(keys)} keys are too few to train {nlist} lists; give at least "
                f"{POINTS_PER_LIST * nlist}, or use exact"
            )
        vectors = self._entries(keys)
        quantizer = faiss.IndexFlat(self.dim, self.faiss_metric)
        index = faiss.IndexIVFFlat(quantizer, self.dim, nlist, self.faiss_metric)
        index.nprobe = min(nlist, self.nprobe or max(32, nlist // 16))
        index.train(vectors.numpy())
        self._index = index

    def _new_index(self) -> Any:
        _faiss()
        return None  # until it is trained

    def _settings(self) -> dict[str, Any]:
        return {"nlist": self.nlist, "nprobe": self.nprobe}

    def _index_bytes(self) -> int:
        lists = 0 if self._index is None else self._index.nlist
        return 4 * self.dim * (len(self) + lists)

    def _add(self, keys: Tensor, ids: Tensor) -> None:
        if self._index is None:
            self.train(keys)
        super()._add(keys, ids)

    def _write(self, folder: Path, number: int) -> list[Shard]:
        if self._index is None:
            raise UserError("faiss_ivf: nothing to save before it is trained or entries are added")
        return super()._write(folder, number)


def _check_positive(engine: str, options: dict[str, int]) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{engine}: {name} is {value}, it must be at least 1")
