"""Documents packed back to back into rows: from a corpus in memory, or from a stream."""

from collections import deque
from collections.abc import Callable, Iterator

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


class StreamRows:
    """Rows over a stream of documents, in the order they come.

    Nothing is kept but what the lanes have not read yet: a new document goes to the lane that got
    the fewest tokens so far, which depends on the stream alone. Rows are cheap in rising order;
    an earlier row starts the stream again and reads up to it, so resuming at a row is exact but
    costs reading (and tokenising) everything before it. The end of the stream is followed by its
    beginning.
    """

    def __init__(
        self,
        open_stream: Callable[[], Iterator[np.ndarray]],
        length: int,
        end: int | None,
        carry: bool,
        lanes: int,
    ) -> None:
        self.open_stream, self.length, self.end = open_stream, length, end
        self.carry, self.lanes = carry, lanes
        self._rewind()

    def _rewind(self) -> None:
        self._stream = self._documents()
        self._waiting: list[deque[np.ndarray]] = [deque() for _ in range(self.lanes)]
        self._offset = [0] * self.lanes  # tokens read of each lane's first waiting document
        self._received = [0] * self.lanes
        self._next = [0] * self.lanes

    def _documents(self) -> Iterator[np.ndarray]:
        while True:
            empty = True
            for document in self.open_stream():
                empty = False
                yield document
            if empty:
                raise UserError("data: the stream holds no text for this split")

    def row(self, lane: int, step: int) -> dict[str, np.ndarray]:
        """Row `step` of `lane`, arrays [length] int64."""
        if step < self._next[lane]:
            self._rewind()
        while True:
            row = self._read(lane)
            if self._next[lane] > step:
                return row

    def _read(self, lane: int) -> dict[str, np.ndarray]:
        writer = RowWriter(self.length, self.end)
        waiting = self._waiting[lane]
        while writer.missing:
            while not waiting:
                self._pull()
            document, offset = waiting[0], self._offset[lane]
            count = min(writer.missing, len(document) - offset)
            last = offset + count == len(document)
            tokens = document[offset : offset + count + (not last)]
            writer.add(tokens, last, offset if self.carry else 0)
            self._offset[lane] = 0 if last else offset + count
            if last:
                waiting.popleft()
        self._next[lane] += 1
        return writer.row()

    def _pull(self) -> None:
        document = next(self._stream)
        lane = min(range(self.lanes), key=self._received.__getitem__)
        self._received[lane] += len(document)
        self._waiting[lane].append(document)
