"""Documents packed back to back into rows: from a corpus in memory, or from a stream."""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from memlm.data.corpus import Corpus
from memlm.errors import UserError

IGNORED = -100


class RowWriter:
    """Fills the arrays of one row piece by piece; a piece is a run of tokens of one document."""

    def __init__(self, length: int, end: int | None) -> None:
        self.input_ids = np.empty(length, dtype=np.int64)
        self.labels = np.empty(length, dtype=np.int64)
        self.segment_ids = np.empty(length, dtype=np.int64)
        self.position_ids = np.empty(length, dtype=np.int64)
        self.end = IGNORED if end is None else end
        self.filled = 0
        self.pieces = 0

    @property
    def missing(self) -> int:
        """Tokens still to be written."""
        return len(self.input_ids) - self.filled

    def add(self, tokens: np.ndarray, last: bool, position: int) -> None:
        """Write tokens[:-1] (tokens[:] when `last`), each with its next token as the target.

        `tokens` [n + 1] brings the token after the piece; with `last` the document ends with
        tokens[-1], whose target is the end of the document. `position` is that of tokens[0].
        """
        count = len(tokens) - (not last)
        piece = slice(self.filled, self.filled + count)
        self.pieces += 1
        self.filled += count
        self.input_ids[piece] = tokens[:count]
        self.segment_ids[piece] = self.pieces
        self.position_ids[piece] = np.arange(position, position + count)
        labels = self.labels[piece]
        labels[: len(tokens) - 1] = tokens[1:]
        if last:
            labels[-1] = self.end

    def row(self) -> dict[str, np.ndarray]:
        """The finished row, arrays [length] int64."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "segment_ids": self.segment_ids,
            "position_ids": self.position_ids,
            "loss_groups": np.zeros(len(self.input_ids), dtype=np.int64),
        }


class CorpusRows:
    """Rows over a corpus in memory; any row costs O(pieces in it + log documents).

    Each epoch shuffles the documents (by seed and epoch) and lays them end to end. With `lanes`,
    lane l reads the l-th of `lanes` equal parts of every epoch, so together they read each epoch
    once. Without carry a row that starts inside a document starts at position 0 there; with carry
    positions go on from the lane's row before. Where a lane's part cuts a document, the rest
    counts as a new document.
    """

    def __init__(
        self, corpus: Corpus, length: int, seed: int, end: int | None, carry: bool, lanes: int
    ) -> None:
        self.corpus, self.length, self.seed, self.end = corpus, length, seed, end
        self.carry = carry
        self.part = len(corpus.tokens) // lanes
        if self.part == 0:
            raise UserError(f"data: {len(corpus.tokens)} tokens are too few for {lanes} lanes")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document order of an epoch and where each document ends in it, int64 [documents]."""
        if epoch not in self._epochs:
            lengths = self.corpus.lengths
            order = np.random.default_rng([self.seed, epoch]).permutation(len(lengths))
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = (order, np.cumsum(lengths[order]))
        return self._epochs[epoch]

    def row(self, lane: int, step: int) -> dict[str, np.ndarray]:
        """Row `step` of `lane`, arrays [length] int64."""
        writer = RowWriter(self.length, self.end)
        at = step * self.length
        while writer.missing:
            epoch, offset = divmod(at, self.part)
            at += self._add_piece(writer, epoch, lane * self.part, offset)
        return writer.row()

    def _add_piece(self, writer: RowWriter, epoch: int, part: int, offset: int) -> int:
        order, ends = self._epoch(epoch)
        place = part + offset
        which = int(np.searchsorted(ends, place, side="right"))
        document, end = int(order[which]), int(ends[which])
        start, stop = (int(edge) for edge in self.corpus.starts[document : document + 2])
        begin = end - (stop - start)
        count = min(writer.missing, end - place, part + self.part - place)
        last = place + count == end
        start += place - begin
        tokens = self.corpus.tokens[start : start + count + (not last)]
        writer.add(tokens, last, place - max(begin, part) if self.carry else 0)
        return count


class Documents(Protocol):
    """Tokenised documents, numbered from 0 in an order without end."""

    def lengths(self, first: int) -> np.ndarray:
        """Tokens of each document from number `first` on, for as many as are at hand, at least one.

        Calls go through the numbers without a gap, or begin again at 0.
        """

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document that `lengths` spoke of."""

    def forget(self, documents: Iterable[int]) -> None:
        """These are not needed any more."""


class StreamRows:
    """Rows over documents in the order they come.

    A document goes to the lane that got the fewest tokens before it, which depends on the lengths
    alone; so a later row is found by adding up lengths. Rows are cheap in rising order; an earlier
    row adds up from the beginning. Of each lane, only what `row` may still ask for is kept.
    """

    def __init__(
        self, documents: Documents, length: int, end: int | None, carry: bool, lanes: int
    ) -> None:
        self.documents, self.length, self.end = documents, length, end
        self.carry, self.lanes = carry, lanes
        self._restart()

    def _restart(self) -> None:
        self._next = 0  # the first document that has no lane yet
        self._floor = 0  # tokens of each lane that are not kept
        self._received = [(0, lane) for lane in range(self.lanes)]  # a heap
        # Where each document ends in its lane, its number and its length.
        self._waiting: list[deque[tuple[int, int, int]]] = [deque() for _ in range(self.lanes)]

    def row(self, lane: int, step: int) -> dict[str, np.ndarray]:
        """Row `step` of `lane`, arrays [length] int64."""
        place = step * self.length
        if place < self._floor:
            self._restart()
        if place > self._floor:
            self._raise_floor(place)
        writer = RowWriter(self.length, self.end)
        waiting, number = self._waiting[lane], 0
        while writer.missing:
            while number == len(waiting):
                self._extend()
            end, document, size = waiting[number]
            offset = place - (end - size)
            count = min(writer.missing, end - place)
            last = place + count == end
            tokens = self.documents.tokens(document, offset, offset + count + (not last))
            writer.add(tokens, last, offset if self.carry else 0)
            place, number = place + count, number + 1
        return writer.row()

    def _raise_floor(self, place: int) -> None:
        self._floor = place
        for waiting in self._waiting:
            while waiting and waiting[0][0] <= place:
                self.documents.forget([waiting.popleft()[1]])

    def _extend(self) -> None:
        """Give the next documents to their lanes."""
        lengths = self.documents.lengths(self._next)
        numbers = range(self._next, self._next + len(lengths))
        self._next = numbers.stop
        if self.lanes == 1:
            ends = self._received[0][0] + np.cumsum(lengths)
            self._received[0] = (int(ends[-1]), 0)
            passed = int(np.searchsorted(ends, self._floor, side="right"))
            self.documents.forget(numbers[:passed])
            kept = (ends[passed:].tolist(), numbers[passed:], lengths[passed:].tolist())
            self._waiting[0].extend(zip(*kept, strict=True))
            return
        for number, length in zip(numbers, lengths.tolist(), strict=True):
            received, lane = self._received[0]
            end = received + length
            heapq.heapreplace(self._received, (end, lane))
            if end > self._floor:
                self._waiting[lane].append((end, number, length))
            else:
                self.documents.forget([number])


class PassingDocuments:
    """Documents of a stream that is read again for whatever was forgotten.

    The end of the stream is followed by its beginning.
    """

    def __init__(self, open_stream: Callable[[], Iterator[np.ndarray]]) -> None:
        self.open_stream = open_stream
        self._restart()

    def _restart(self) -> None:
        self._stream = self._endless()
        self._next = 0
        self._kept: dict[int, np.ndarray] = {}

    def _endless(self) -> Iterator[np.ndarray]:
        while True:
            empty = True
            for document in self.open_stream():
                empty = False
                yield document
            if empty:
                raise UserError("data: the stream holds no text for this split")

    def lengths(self, first: int) -> np.ndarray:
        """Of one document, int64 [1]."""
        if first < self._next:
            self._restart()
        self._kept[first] = next(self._stream)
        self._next = first + 1
        return np.asarray([len(self._kept[first])])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document that was not forgotten."""
        return self._kept[document][start:stop]

    def forget(self, documents: Iterable[int]) -> None:
        """Let go of documents."""
        for document in documents:
            del self._kept[document]
