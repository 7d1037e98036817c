"""Facts between the sentences of a long text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memlm.data.stories.tokens import StoryTokens
from memlm.evaluation.babilong.sentences import Sentences
from memlm.evaluation.prompts import Context
from memlm.evaluation.tasks.base import Tools

_EXCERPT = 60  # tokens shown on each side of a fact


class ScatteredFacts(StoryTokens):
    """Places facts in the haystack of an evaluation."""

    def __init__(self, tools: Tools):
        super().__init__(tools.tokenizer)
        self.tools = tools
        self.sentences = Sentences(tools.tokenizer)

    def pieces(
        self, facts: list[str], body: int, rng: np.random.Generator
    ) -> tuple[list[Any], list[int]]:
        """Pieces of `body` tokens with the facts between sentences, and where each fact starts.

        The text is one stretch of the haystack; its last sentence is cut off, as in BABILong.
        """
        ids = self.facts(facts)
        room = body - sum(map(len, ids))
        if room == 0:
            return ids, [int(start) for start in np.cumsum([0, *map(len, ids[:-1])])]
        haystack = self.tools.haystack
        offset = int(rng.integers(0, max(1, len(haystack) - body)))
        offset = self.sentences.end_near(haystack.read, offset, 0, len(haystack))
        # Behind the text the first fact has a space before it, which may be a token more.
        spaced = [self.fact(fact, " ") for fact in facts]
        latest = max(0, room - abs(len(spaced[0]) - len(ids[0]))) if facts else 0
        places = np.sort(rng.integers(0, latest, size=len(facts), endpoint=True)).tolist()
        ends = [
            self.sentences.end_near(haystack.read, offset + place, offset, offset + latest)
            for place in places
        ]
        if not ends or ends[0] > offset:
            ids = spaced
            offset = offset + self.sentences.leading_space(haystack.read(offset, offset + 64))
        pieces: list[Any] = []
        starts: list[int] = []
        done, size = offset, 0
        for end, fact in zip(ends, ids, strict=True):
            text = haystack.piece(done, max(0, end - done))
            done = max(done, end)
            starts.append(size + len(text))
            pieces += [text, fact]
            size += len(text) + len(fact)
        return [*pieces, haystack.piece(done, body - size)], starts

    def excerpt(self, context: Context, told: Sequence[tuple[str, int]], begin: int) -> str:
        """Some facts and the text around them.

        Args:
            context: what they stand in.
            told: each fact with its place in the context, ascending.
            begin: where the text starts in the context.
        """
        spans: list[list[int]] = []
        for fact, place in told:
            start = max(begin, place - _EXCERPT)
            end = place + len(self.fact(fact, " ")) + _EXCERPT
            if spans and start <= spans[-1][1]:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        decode = self.tokenizer.decode
        return " … ".join(decode(context.read(*span).tolist()) for span in spans)
