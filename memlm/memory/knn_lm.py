"""kNN-LM: what followed the hidden states of a corpus that are nearest to the present one.

Khandelwal et al. 2020, "Generalization through Memorization: Nearest Neighbor Language Models",
arXiv 1911.00172: p_kNN(y) is the sum, over the k nearest entries whose next token is y, of the
softmax of -distance / temperature; the distance is the squared one of their implementation.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memlm.errors import UserError, nearest
from memlm.layers.context import CallContext
from memlm.memory.output_memory import (
    BLOCK,
    WEIGHTS,
    Evidence,
    OutputMemory,
    OutputMemoryConfig,
    register_output,
)
from memlm.retrieval.choice import ENGINES
from memlm.retrieval.corpus_store import CorpusStore, store_fingerprint

NEXT_TOKEN = "next_token"  # the value that an entry of the store must have


@dataclasses.dataclass(kw_only=True)
class KnnLMConfig(OutputMemoryConfig):
    """Where the corpus is, and choices.

    Attributes:
        store: folder of a corpus store of the model's hidden states before the head, each with the
            token that followed it (`next_token`).
        top_k: entries found per token.
        metric: the one that the store was made for; l2 as in the paper.
        engine: "exact"; "auto" = the index of the store if it has one, else exact, which is
            logged; or the name of the index that the store must have.
    """

    store: str | None = None
    top_k: int = 1024
    metric: Literal["l2", "dot", "cosine"] = "l2"
    engine: str = "auto"

    def check(self) -> None:
        super().check()
        if self.store is None:
            raise UserError("store is missing: a folder made by memlm.memory.build_store")
        if self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, it must be at least 1")
        engines = ("auto", *ENGINES)
        if self.engine not in engines:
            raise UserError(
                f"engine {self.engine!r} is not one of {', '.join(engines)}"
                f"{nearest(self.engine, engines)}"
            )


logger = logging.getLogger(__name__)
# Outside of the modules: a store is neither copied nor saved with a model.
_STORES: WeakKeyDictionary[nn.Module, CorpusStore] = WeakKeyDictionary()


@register_output("knn_lm", KnnLMConfig)
class KnnLM(OutputMemory):
    """Find the nearest entries of a corpus that was read before; nothing is ever written.

    The store is opened read-only and memory-mapped when the first token is predicted. It must have
    been made by the weights that the model has then; the distribution of the store takes no
    gradient.
    """

    def init_state(self, batch_size: int, device=None, dtype=None) -> None:
        return None

    def store(self, context: CallContext) -> CorpusStore:
        """The opened store.

        Raises:
            UserError: when there is none, or it belongs to other weights or another metric.
        """
        if self not in _STORES:
            projection, config = context.shared[WEIGHTS](), self.config
            try:
                store = CorpusStore.open(
                    config.store,
                    projection=projection,
                    metric=config.metric,
                    engine=config.engine,
                )
            except UserError as error:
                raise UserError(f"knn_lm: {error}") from error
            size = store.layout.key_size
            if size != self.hidden_size:
                raise UserError(
                    f"knn_lm: {config.store} has keys of {size} numbers, but the model hidden "
                    f"states of {self.hidden_size}"
                )
            if NEXT_TOKEN not in store.layout.values:
                raise UserError(f"knn_lm: {config.store} does not say which token follows an entry")
            found = "exactly"
            if store.engine != "exact":
                found = f"by {store.engine} (recall {store.index['recall']:.4f} when it was built)"
            logger.info("knn_lm: %s, %d entries, searched %s", config.store, len(store), found)
            _STORES[self] = store
        return _STORES[self]

    def store_fingerprint(self) -> str:
        """The fingerprint of what is in the store.

        Raises:
            UserError: when there is none.
        """
        try:
            return store_fingerprint(self.config.store)
        except UserError as error:
            raise UserError(f"knn_lm: {error}") from error

    def read(
        self, hidden: Tensor, state: None, context: CallContext, columns: Tensor
    ) -> tuple[Iterator[Evidence], None]:
        store = self.store(context)
        return self._search(
            store, hidden[:, columns].detach(), context.layout.valid[:, columns]
        ), None

    def _search(self, store: CorpusStore, queries: Tensor, valid: Tensor) -> Iterator[Evidence]:
        """Blocks of the evidence of queries [B, N, hidden_size]; bool [B, N], where there is one.

        A block is large: every search reads the whole store.
        """
        k = self.config.top_k
        step = max(1, BLOCK // (len(queries) * k))
        for block, here in zip(queries.split(step, 1), valid.split(step, 1), strict=True):
            scores, ids = store.search(block[here], k)
            tokens = store.take(NEXT_TOKEN, ids).long()
            all_scores = scores.new_full((*here.shape, k), -torch.inf)
            all_tokens = tokens.new_zeros(*here.shape, k)
            all_scores[here], all_tokens[here] = scores, tokens
            yield Evidence(all_scores, all_tokens)

    def flops(self, tokens: int) -> int:
        """0: the work of the search depends on the corpus alone."""
        return 0
