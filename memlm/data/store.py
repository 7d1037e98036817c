"""The tokenised texts of a run: each is opened once, for both splits and any length of rows."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.config import DataConfig, HubSource, Source
from memlm.data.corpus import Corpus, build_corpora, encode_documents, in_split, require_text
from memlm.data.hub import HubReader
from memlm.data.shards import local_share, prepare_shards, read_shards
from memlm.data.stream_log import StreamLog
from memlm.data.text_origin import TextOrigin, text_origin
from memlm.data.text_rows import Documents, PassingDocuments

_logger = logging.getLogger(__name__)


class TextStore:
    """Tokenised texts in memory, or in the folder `shards` of the data section.

    Args:
        config: the data section; a store serves its sources only.
        tokenizer: tokenises them.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._corpora: dict[tuple[TextOrigin, str], Corpus] = {}
        self._folders: dict[TextOrigin, Path] = {}
        self._logs: dict[str, StreamLog] = {}

    def corpus(self, source: Source, split: str) -> Corpus:
        """The documents of a source that is not streamed; raises UserError as the readers do."""
        origin = text_origin(source)
        if (origin, split) not in self._corpora:
            self._open(origin, split)
        return require_text(self._corpora[origin, split], split)

    def _open(self, origin: TextOrigin, split: str) -> None:
        config, fraction = self.config, self.config.validation_fraction
        if config.shards is None:
            for each, corpus in build_corpora(origin.documents(), self.tokenizer, fraction).items():
                self._corpora[origin, each] = corpus
            return
        if origin not in self._folders:
            self._folders[origin] = prepare_shards(
                config.shards, origin, self.tokenizer, fraction, config.tokenize_processes
            )
        self._corpora[origin, split] = read_shards(self._folders[origin], split)

    def stream(self, source: HubSource, split: str) -> Documents:
        """The documents of a streamed source; raises UserError as `StreamLog` does."""
        config = self.config
        if config.shards is None:
            if split == "train" and local_share()[0] == 0:
                _logger.warning(
                    "data.sources: %r is streamed and data.shards is null: each process tokenises "
                    "all of it, and a resumed run reads it again from its beginning",
                    source.dataset,
                )
            return PassingDocuments(lambda: self._passing(source, split))
        key = repr(replace(source, weight=1.0))
        if key not in self._logs:
            self._logs[key] = StreamLog(
                config.shards, source, config.seed, self.tokenizer, config.validation_fraction
            )
        return self._logs[key].documents(split)

    def _passing(self, source: HubSource, split: str) -> Iterator[np.ndarray]:
        fraction = self.config.validation_fraction
        texts = HubReader(source, self.config.seed)
        chosen = (text for text in texts if in_split(text, split, fraction))
        return encode_documents(chosen, self.tokenizer)
