"""A model reads a corpus: in which order, and the hidden states it has before its head."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memlm.data.corpus import Corpus
from memlm.errors import UserError
from memlm.layers.state import MemoryState


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document, in row `row` of a batch from column `column` on."""

    row: int
    column: int
    document: int
    start: int
    stop: int

    @property
    def columns(self) -> slice:
        """Where it lies in its row."""
        return slice(self.column, self.column + self.stop - self.start)


@dataclass(frozen=True)
class Step:
    """A batch: its pieces, and which rows of the batch before it continues, in their order."""

    pieces: list[Piece]
    continued: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows = 1 + max(piece.row for piece in self.pieces)
        return rows, max(piece.columns.stop for piece in self.pieces)


def window_steps(lengths: Sequence[int], size: int, rows: int) -> Iterator[Step]:
    """Documents one after the other in windows, each a row of its own.

    Args:
        lengths: tokens to read of each document.
        size: tokens of a window.
        rows: windows of a batch.
    """
    pieces: list[Piece] = []
    for document, length in enumerate(lengths):
        for start in range(0, length, size):
            stop = min(start + size, length)
            pieces.append(Piece(len(pieces), 0, document, start, stop))
            if len(pieces) == rows:
                yield Step(pieces, [])
                pieces = []
    if pieces:
        yield Step(pieces, [])


def stream_steps(lengths: Sequence[int], size: int, rows: int) -> Iterator[Step]:
    """Documents side by side: a row reads on where it was, and takes the next one when it is done.

    Rows that are done when no document is left are dropped.

    Args:
        lengths: tokens to read of each document.
        size: tokens of a row.
        rows: the most rows of a batch.
    """
    waiting = iter(document for document, length in enumerate(lengths) if length)
    places = [(document, 0) for _, document in zip(range(rows), waiting, strict=False)]
    continued: list[int] = []
    while places:
        pieces: list[Piece] = []
        after: list[tuple[int, int] | None] = []
        for row, place in enumerate(places):
            column = 0
            while place is not None and column < size:
                document, start = place
                stop = min(start + size - column, lengths[document])
                pieces.append(Piece(row, column, document, start, stop))
                column += stop - start
                place = (document, stop)
                if stop == lengths[document]:
                    following = next(waiting, None)
                    place = None if following is None else (following, 0)
            after.append(place)
        yield Step(pieces, continued)
        continued = [row for row, place in enumerate(after) if place is not None]
        places = [place for place in after if place is not None]


class CorpusReader(ABC):
    """Gives the states that a model's head sees, for the batches of `steps`.

    Args:
        model: a causal language model of transformers, on its device.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @staticmethod
    @abstractmethod
    def steps(lengths: Sequence[int], size: int, rows: int) -> Iterator[Step]:
        """The batches in which it reads."""

    @abstractmethod
    def read(self, corpus: Corpus, step: Step) -> Tensor:
        """Hidden states [rows, columns, hidden_size] of a batch."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What it has to remember between two batches, on the CPU."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on after the batch at which `state` was taken."""

    @property
    @abstractmethod
    def largest_piece(self) -> int | None:
        """The most tokens of a row; None = any number."""

    @property
    @abstractmethod
    def longest_document(self) -> int | None:
        """The most tokens of a document; None = any number."""

    def _tokens(self, corpus: Corpus, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions, and documents counted from 1 (0 = padding); int64 [rows, columns]."""
        tokens, positions, documents = torch.zeros(3, *step.shape, dtype=torch.int64)
        for piece in step.pieces:
            place = (piece.row, piece.columns)
            first = int(corpus.starts[piece.document])
            values = corpus.tokens[first + piece.start : first + piece.stop].astype("int64")
            tokens[place] = torch.from_numpy(values)
            positions[place] = torch.arange(piece.start, piece.stop)
            documents[place] = piece.document + 1
        device = self.model.device
        return tokens.to(device), positions.to(device), documents.to(device)


class WindowReader(CorpusReader):
    """Of any model: what stands before a window is not seen in it."""

    steps = staticmethod(window_steps)

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._check_head()

    @property
    def largest_piece(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def longest_document(self) -> int | None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing is carried from batch to batch."""

    @torch.no_grad()
    def read(self, corpus: Corpus, step: Step) -> Tensor:
        tokens, _, documents = self._tokens(corpus, step)
        return self._hidden(input_ids=tokens, attention_mask=(documents > 0).long())

    def _hidden(self, **inputs: Tensor) -> Tensor:
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise UserError when the head sees something else than the last hidden states."""
        head = self.model.get_output_embeddings()
        seen: list[Tensor] = []
        if head is not None and self.model.base_model is not self.model:
            handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            tokens = torch.zeros(1, 4, dtype=torch.int64, device=self.model.device)
            try:
                self.model(input_ids=tokens, use_cache=False)
                fits = bool(seen) and torch.equal(seen[0], self._hidden(input_ids=tokens))
            finally:
                handle.remove()
            if fits:
                return
        raise UserError(
            f"--model: a {self.model.config.model_type!r} model changes its last hidden states "
            "before the head, so what its head sees cannot be read"
        )


class StreamReader(CorpusReader):
    """Of a model with memory states: it reads documents from end to end."""

    steps = staticmethod(stream_steps)

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._states: dict[str, MemoryState] | None = None

    @property
    def largest_piece(self) -> int | None:
        return None

    @property
    def longest_document(self) -> int | None:
        return self.model.max_context

    @torch.no_grad()
    def read(self, corpus: Corpus, step: Step) -> Tensor:
        tokens, positions, documents = self._tokens(corpus, step)
        if self._states is not None:
            rows = torch.tensor(step.continued, dtype=torch.int64)
            self._states = {name: state.select(rows) for name, state in self._states.items()}
        hidden, self._states = self.model.base_model(
            input_ids=tokens,
            position_ids=positions,
            segment_ids=documents,
            memory_states=self._states,
        )
        return hidden

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{field}": tensor.cpu().clone()
            for name, state in (self._states or {}).items()
            for field, tensor in state.state_dict().items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        templates = self.model.base_model.init_states(1)
        fields: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, field = key.split("/", 1)
            fields.setdefault(name, {})[field] = tensor.to(self.model.device)
        states = {
            name: type(templates[name]).from_state_dict(tensors) for name, tensors in fields.items()
        }
        self._states = states or None


def corpus_reader(model: Any) -> CorpusReader:
    """The reader that fits a model."""
    return StreamReader(model) if hasattr(model, "init_states") else WindowReader(model)


def entries_of(corpus: Corpus, step: Step, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The entries of a batch: keys [N, hidden_size], and what stands beside each.

    Args:
        corpus: the documents.
        step: the batch.
        hidden: [rows, columns, hidden_size], as it was read.

    Returns:
        keys, and the values next_token (int32 [N]), position and document (int64 [N]).
    """
    keys, tokens, positions, documents = [], [], [], []
    for piece in step.pieces:
        first = int(corpus.starts[piece.document]) + 1
        following = corpus.tokens[first + piece.start : first + piece.stop].astype("int32")
        keys.append(hidden[piece.row, piece.columns])
        tokens.append(torch.from_numpy(following))
        positions.append(torch.arange(piece.start, piece.stop))
        documents.append(torch.full((piece.stop - piece.start,), piece.document))
    values = {"next_token": tokens, "position": positions, "document": documents}
    return torch.cat(keys), {name: torch.cat(parts) for name, parts in values.items()}
