"""Training rows of stories: question and answer behind the facts."""

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.example_rows import IGNORED, ExampleRows
from memlm.data.stories.make import make_story
from memlm.data.stories.tokens import StoryTokens
from memlm.errors import UserError

_TRIES = 16  # stories, until one fits an empty row


class StoryRows:
    """Rows of `length` tokens that hold as many stories as fit, each a document of its own.

    Only answers are targets (loss group 1). Row `index` is a pure function of all arguments.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        hops: tuple[int, int],
        sentences: tuple[int, int],
        number: int = 0,
    ) -> None:
        """Prepare the words.

        Args:
            tokenizer: of the texts.
            length: tokens of a row.
            seed: of everything that is drawn.
            hops: fewest and most supporting facts of a question.
            sentences: fewest and most facts of a story.
            number: of the source in its mixture, so that two do not draw the same rows.

        Raises:
            UserError: when rows are too short for the shortest stories.
        """
        self.tokens = StoryTokens(tokenizer)
        self.length, self.seed, self.number = length, seed, number
        self.hops, self.sentences = hops, sentences
        if sentences[0] > length:
            raise self._too_short(f"more than {sentences[0]}")
        self._story(np.random.default_rng(seed), length, [sentences[0]] * _TRIES)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64; see `ExampleRows`."""
        rows = ExampleRows(len(indices), self.length)
        for row, index in enumerate(indices):
            rng = np.random.default_rng([self.seed, int(index), self.number])
            first = True
            while (found := self._next(rng, rows.room(row), first)) is not None:
                ids, answer = found
                labels = np.full(len(ids) - 1, IGNORED, dtype=np.int64)
                labels[-answer:] = ids[-answer:]
                rows.add(row, ids[:-1], labels)
                first = False
        return rows.batch()

    def _next(
        self, rng: np.random.Generator, room: int, first: bool
    ) -> tuple[np.ndarray, int] | None:
        """A story that fits `room`; None when the one drawn does not and the row has another."""
        low, high = self.sentences
        drawn = int(rng.integers(low, high + 1))
        if not first:
            if drawn > room:  # as every fact has a token; a long story takes long to make
                return None
            ids, answer = self._draw(rng, drawn)
            return (ids, answer) if len(ids) - 1 <= room else None
        # An empty row gets a shorter one rather than none.
        sizes = [max(low, drawn >> halvings) for halvings in range(_TRIES // 2)]
        return self._story(rng, room, [*sizes, *[low] * _TRIES])

    def _story(
        self, rng: np.random.Generator, room: int, sizes: list[int]
    ) -> tuple[np.ndarray, int]:
        """The first story of some numbers of sentences that fits `room`."""
        least = None
        for size in sizes:
            if size > room:
                continue
            ids, answer = self._draw(rng, size)
            if len(ids) - 1 <= room:
                return ids, answer
            least = len(ids) - 1 if least is None else min(least, len(ids) - 1)
        raise self._too_short(f"about {least}")

    def _too_short(self, tokens: str) -> UserError:
        return UserError(
            f"data.sources: stories of {self.sentences[0]} sentences need {tokens} tokens; rows of "
            f"{self.length} tokens are too short"
        )

    def _draw(self, rng: np.random.Generator, sentences: int) -> tuple[np.ndarray, int]:
        hops = int(rng.integers(self.hops[0], self.hops[1] + 1))
        return self.tokens.whole(make_story(hops, sentences, rng))
