"""Rows of fixed length from a mixture of sources; one global row index is the whole data state."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.config import (
    DataConfig,
    HubSource,
    MqarSource,
    PasskeySource,
    Source,
    StoriesSource,
    SyntheticSource,
)
from memlm.data.corpus import check_split
from memlm.data.mqar import MqarRows
from memlm.data.passkey import PasskeyRows
from memlm.data.store import TextStore
from memlm.data.stories.rows import StoryRows
from memlm.data.synthetic import SyntheticRows
from memlm.data.text_rows import CorpusRows, StreamRows
from memlm.errors import UserError

_BLOCK = 4096  # rows within which the mixture keeps its weights exactly
_MQAR_VOCABULARY = 8192  # zoology's
_HELD_OUT_SEED = 1_000_003  # of rows that are computed; training seeds are small


class PackedDataset:
    """Rows `{input_ids, labels, segment_ids, position_ids, loss_groups}`, 1-D int64 [length].

    `labels` are shifted already: labels[t] is the target of position t, the next token, the
    tokenizer's eos at the end of a document, -100 where there is none. `segment_ids` number the
    documents of the row from 1; `position_ids` count within the document; `loss_groups` are 0 for
    text and 1 for answers.

    `row(index)` is a pure function of (config, split, length, lanes, index), for any index >= 0:
    epochs wrap and reshuffle. The validation split does not depend on the seed. Sources are mixed
    by weight, exactly within each 4096 rows. With `config.carry`, row index is step
    `index // lanes` of lane `index % lanes`: a text document goes on in the lane's next row, with
    its positions, and each lane keeps to one source (lanes are shared out by weight).

    Local text is tokenised once and kept in memory (uint16 or int32), or read from the files of
    `config.shards`, which hold the same documents in the same order. Streamed datasets keep their
    stream order in every epoch. With `config.shards` they are written there as they are read;
    without, going back or starting at a late row reads the stream up to there again. `store` is
    that of another dataset with the same sources and tokenizer, whose texts are shared.
    Raises UserError for anything the config or its files get wrong.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        length: int,
        lanes: int = 1,
        store: TextStore | None = None,
    ) -> None:
        check_split(split, config.validation_fraction)
        if config.seed == _HELD_OUT_SEED:
            raise UserError(f"data.seed: {config.seed} is that of held-out rows; choose another")
        self.config, self.tokenizer, self.split = config, tokenizer, split
        self.sources = config.parsed_sources()
        self.seed = config.seed if split == "train" else 0
        self.store = TextStore(config, tokenizer) if store is None else store
        self._set_shape(length, lanes)

    def with_length(
        self,
        length: int,
        digits: tuple[int, int] | None = None,
        lanes: int | None = None,
    ) -> "PackedDataset":
        """The same data in rows of another length, sharing the tokenised text.

        `digits` (lowest, highest) replaces the number of digits of passkey rows, `lanes` the
        number of lanes; None keeps them. Used by the length curriculum.
        """
        view = object.__new__(PackedDataset)
        view.__dict__.update(self.__dict__)
        if digits is not None:
            view.sources = [
                replace(source, digits=tuple(digits))
                if isinstance(source, PasskeySource)
                else source
                for source in self.sources
            ]
        view._set_shape(length, self.lanes if lanes is None else lanes)
        return view

    def row(self, index: int) -> dict[str, Tensor]:
        """Row `index` >= 0 as a dict of int64 tensors [length]."""
        return {name: values[0] for name, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices` stacked: a dict of int64 tensors [len(indices), length]."""
        if min(indices) < 0:
            raise UserError(f"data row index must be >= 0, got {min(indices)}")
        places = [self._place(int(index)) for index in indices]
        parts: list[dict[str, np.ndarray]] = []
        order: list[int] = []
        for number, rows in enumerate(self._rows):
            chosen = [i for i, (source, _, _) in enumerate(places) if source == number]
            if not chosen:
                continue
            order += chosen
            if isinstance(rows, (CorpusRows, StreamRows)):
                parts += [
                    {name: values[None] for name, values in rows.row(lane, step).items()}
                    for _, lane, step in (places[i] for i in chosen)
                ]
            else:
                counters = [self._counter(*places[i]) for i in chosen]
                parts.append(rows.batch(np.asarray(counters, dtype=np.int64)))
        back = np.argsort(order)
        return {
            name: torch.from_numpy(np.concatenate([part[name] for part in parts])[back])
            for name in parts[0]
        }

    def sources_of(self, indices: Sequence[int]) -> Tensor:
        """The source of each of the rows `indices`, int64 [len(indices)]."""
        return torch.tensor([self._place(int(index))[0] for index in indices], dtype=torch.int64)

    @property
    def source_names(self) -> list[str]:
        """A name for each source: its type, and a number from the second of that type on."""
        kinds = [entry["type"] for entry in self.config.sources]
        counts = [kinds[: place + 1].count(kind) for place, kind in enumerate(kinds)]
        return [
            kind if count == 1 else f"{kind}.{count}"
            for kind, count in zip(kinds, counts, strict=True)
        ]

    @property
    def epoch_rows(self) -> int | None:
        """Rows that hold each local text once (None when every source is endless or streamed)."""
        counts = [
            int(np.ceil(len(rows.corpus.tokens) / self.length / share))
            for rows, share in zip(self._rows, self._shares(), strict=True)
            if isinstance(rows, CorpusRows)
        ]
        return max(counts) if counts else None

    def _shares(self) -> np.ndarray:
        weights = np.asarray([source.weight for source in self.sources])
        return weights / weights.sum()

    def _set_shape(self, length: int, lanes: int) -> None:
        if length < 1 or lanes < 1:
            raise UserError(f"data: length and lanes must be >= 1, got {length} and {lanes}")
        self.length, self.lanes = length, lanes
        # A tile of the mixture: the source of each place in a block, before shuffling.
        parts = lanes if self.config.carry else _BLOCK
        middles = (np.arange(parts) + 0.5) / parts
        self._tile = np.searchsorted(np.cumsum(self._shares())[:-1], middles, side="right")
        self._counts = np.bincount(self._tile, minlength=len(self.sources))
        for source, count in zip(self.sources, self._counts, strict=True):
            if count == 0:
                where = f"{lanes} lanes" if self.config.carry else f"{_BLOCK} rows"
                raise UserError(
                    f"data.sources: weight {source.weight} gives a source none of {where}"
                )
        # Number of earlier places of the same source in the tile.
        self._ranks = _ranks(self._tile)
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._rows = [
            self._make_rows(source, int(count), number)
            for number, (source, count) in enumerate(zip(self.sources, self._counts, strict=True))
        ]

    def _place(self, index: int) -> tuple[int, int, int]:
        """(source, lane within the source, step within that lane) of a global row index."""
        if self.config.carry:
            step, lane = divmod(index, self.lanes)
            return int(self._tile[lane]), int(self._ranks[lane]), step
        block, offset = divmod(index, _BLOCK)
        if len(self.sources) == 1:
            return 0, 0, index
        found = self._block  # rows are read in one thread and their sources asked for in another
        if found is None or found[0] != block:
            tile = np.random.default_rng([self.seed, block]).permutation(self._tile)
            self._block = found = (block, tile, _ranks(tile))
        source = int(found[1][offset])
        return source, 0, block * int(self._counts[source]) + int(found[2][offset])

    def _counter(self, source: int, lane: int, step: int) -> int:
        lanes = int(self._counts[source]) if self.config.carry else 1
        return step * lanes + lane

    def _make_rows(
        self, source: Source, lanes: int, number: int
    ) -> CorpusRows | StreamRows | PasskeyRows | MqarRows | StoryRows | SyntheticRows:
        # Of the same type: one that is the only one of its type has the same rows at any place.
        before = sum(type(one) is type(source) for one in self.sources[:number])
        if isinstance(source, PasskeySource):
            tokens = self.store.corpus(source, self.split).tokens
            return PasskeyRows(
                tokens,
                self.tokenizer,
                self.length,
                self.seed,
                source.digits,
                source.queries,
                before,
            )
        drawn = self.seed if self.split == "train" else _HELD_OUT_SEED
        if isinstance(source, MqarSource):
            vocabulary = source.vocab_size
            if vocabulary is None:
                vocabulary = min(_MQAR_VOCABULARY, self.tokenizer.vocab_size)
            if vocabulary > len(self.tokenizer):
                raise UserError(
                    f"mqar: vocab_size {vocabulary} is larger than the tokenizer's "
                    f"{len(self.tokenizer)}"
                )
            return MqarRows(
                vocabulary, self.length, source.pairs, drawn, source.random_filler, before
            )
        if isinstance(source, StoriesSource):
            return StoryRows(
                self.tokenizer, self.length, drawn, source.hops, source.sentences, number
            )
        if isinstance(source, SyntheticSource):
            generator = source.generator
            rows = SyntheticRows(generator, self.length, drawn, source.lengths, number)
            if generator.vocabulary > len(self.tokenizer):
                raise UserError(
                    f"data.sources: {generator.title} needs {generator.vocabulary} token ids, the "
                    f"tokenizer has {len(self.tokenizer)}; data.tokenizer: "
                    f"integers:{generator.vocabulary} has as many"
                )
            return rows
        end = self.tokenizer.eos_token_id
        carry = self.config.carry
        lanes = lanes if carry else 1
        if isinstance(source, HubSource) and source.streaming:
            documents = self.store.stream(source, self.split)
            return StreamRows(documents, self.length, end, carry, lanes)
        corpus = self.store.corpus(source, self.split)
        return CorpusRows(corpus, self.length, self.seed, end, carry, lanes)


def _ranks(tile: np.ndarray) -> np.ndarray:
    """How many earlier entries of `tile` have the same value, int64 [len(tile)]."""
    ranks = np.empty(len(tile), dtype=np.int64)
    for value in np.unique(tile):
        places = np.flatnonzero(tile == value)
        ranks[places] = np.arange(len(places))
    return ranks
