"""A needle in a haystack: what is best to do in a city, hidden in a long text.

Definition and wording are those of Kamradt, "Needle In A Haystack: pressure testing LLMs" (2023),
github.com/gkamradt/LLMTest_NeedleInAHaystack (see NOTICE): a sentence is put into real text at
int(tokens * depth), moved back to the end of a sentence, or behind the text at depth 100 %; the
depths are even steps from 0 to 100 %. Of several needles the first one has the depth of the grid
and the others follow in even steps before the end. The prompt is the repository's for models that
complete text.

What differs from there:

- The score. There a model grades the answer from 1 to 10; here an answer is right when it holds
  all key phrases of the needle (of the sandwich: "eat a sandwich", "Dolores Park", "sunny day").
- Several needles are about different cities and each is asked for by a question of its own;
  there, one question asks for what all needles say together.
- Prompts have the wanted length to the token, question and answer included, where there is a
  buffer of 200 tokens; the text starts at a random place of the haystack and not at its start.
- A needle counts as the end of a sentence, so that none is split by the newline that ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.errors import UserError
from memlm.evaluation.haystack import Haystack
from memlm.evaluation.prompts import (
    Context,
    Question,
    Trial,
    check_writes,
    encode_behind,
    encode_prompt,
)
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, PromptTask, Record, Tools

HEAD = (
    "You are a helpful AI bot that answers questions for a user. Keep your response short and "
    "direct\n\nHuman: <context>\n"
)
TAIL = (
    "\n</context>\n\n{retrieval_question} Don't give information outside the document or repeat "
    "your findings\n\nAssistant: Here is the most relevant sentence in the context:"
)
NEEDLE = "\nThe best thing to do in {city} is {activity}.\n"
RETRIEVAL_QUESTION = "What is the best thing to do in {city}?"
ACTIVITY = "{action} and sit in {place} on a {weather} day"

CITIES = (
    "San Francisco", "Lisbon", "Oslo", "Nairobi", "Kyoto", "Montreal", "Lima", "Dublin", "Prague",
    "Cairo", "Melbourne", "Helsinki", "Chicago", "Naples", "Seoul", "Vienna", "Havana", "Glasgow",
    "Istanbul", "Toronto", "Mumbai", "Warsaw", "Seville", "Auckland",
)  # fmt: skip
ACTIONS = (
    "eat a sandwich", "fly a kite", "read a comic", "feed the ducks", "paint a fence",
    "play chess", "peel an orange", "write a postcard", "count the trams", "knit a scarf",
    "tune a banjo", "sketch a bridge", "fold a napkin", "learn a poem", "taste the honey",
    "polish a teapot", "juggle lemons", "mend a lantern", "press a flower", "whistle a waltz",
    "carve a spoon", "plant a fern", "roast a chestnut", "drink cold cider",
)  # fmt: skip
PLACES = (
    "Dolores Park", "Almond Square", "Copper Garden", "Harbor Meadow", "Willow Court",
    "Falcon Yard", "Thistle Grove", "Marble Terrace", "Juniper Field", "Lantern Alley",
    "Orchard Steps", "Heron Gardens", "Velvet Plaza", "Saffron Green", "Quarry Common",
    "Clover Arcade", "Pepper Wharf", "Maple Crescent", "Granite Lawn", "Ivory Pavilion",
    "Cobalt Quay", "Linden Cloister", "Barley Market", "Amber Row",
)  # fmt: skip
WEATHERS = ("sunny", "windy", "foggy", "rainy", "snowy", "frosty", "cloudy", "stormy")

_LOOK = 1 << 12  # tokens read at a time where the end of a sentence is looked for
_EXCERPT = 80  # tokens shown on each side of a needle


@dataclass(frozen=True)
class Fact:
    """What is best to do in a city."""

    city: str
    action: str
    place: str
    weather: str

    @property
    def needle(self) -> str:
        """The sentence in its two newlines."""
        activity = ACTIVITY.format(action=self.action, place=self.place, weather=self.weather)
        return NEEDLE.format(city=self.city, activity=activity)

    @property
    def phrases(self) -> tuple[str, ...]:
        """What an answer has to hold."""
        return self.action, self.place, f"{self.weather} day"


def draw_facts(needles: int, rng: np.random.Generator) -> tuple[list[Fact], list[Fact]]:
    """The facts of a trial, and those that are hidden instead when values change.

    A single fact is the official one. Otherwise cities and values are drawn, actions and places
    without replacement, so that no two needles of a trial share them. Every part of a changed
    value is another one.
    """
    cities = rng.choice(len(CITIES), needles, replace=False)
    values = np.stack(
        [
            rng.choice(len(ACTIONS), needles, replace=False),
            rng.choice(len(PLACES), needles, replace=False),
            rng.choice(len(WEATHERS), needles),
        ],
        axis=1,
    )
    if needles == 1:
        cities, values = np.zeros(1, dtype=np.int64), np.zeros((1, 3), dtype=np.int64)
    sizes = np.array([len(ACTIONS), len(PLACES), len(WEATHERS)])
    changed = (values + rng.integers(1, sizes)) % sizes
    plain, others = (
        [
            Fact(CITIES[city], ACTIONS[action], PLACES[place], WEATHERS[weather])
            for city, (action, place, weather) in zip(cities, some, strict=True)
        ]
        for some in (values, changed)
    )
    return plain, others


def needle_places(
    haystack: Haystack,
    ends_sentence: np.ndarray,
    offset: int,
    room: int,
    sizes: Sequence[int],
    percent: float,
) -> list[int]:
    """Before which token of the text each needle stands, ascending.

    Args:
        haystack: where the text comes from.
        ends_sentence: bool [vocabulary], tokens that a needle may follow.
        offset: start of the text in the haystack.
        room: tokens of the text.
        sizes: tokens of each needle.
        percent: depth of the first needle, 0 to 100.
    """
    places: list[int] = []
    hidden = 0  # tokens of the needles placed so far
    for number, size in enumerate(sizes):
        if percent == 100:
            places.append(room)
            continue
        depth = percent + number * (100 - percent) / len(sizes)
        wanted = int((room + hidden) * (depth / 100)) - hidden
        first = places[-1] if places else 0
        places.append(_sentence_end(haystack, ends_sentence, offset, first, wanted))
        hidden += size
    return places


def _sentence_end(
    haystack: Haystack, ends_sentence: np.ndarray, offset: int, first: int, wanted: int
) -> int:
    """The last place up to `wanted` behind the end of a sentence; `first` if there is none."""
    stop = wanted
    while stop > first:
        start = max(first, stop - _LOOK)
        ids = haystack.read(offset + start, offset + stop)
        found = np.flatnonzero(ends_sentence[ids])
        if len(found):
            return start + int(found[-1]) + 1
        stop = start
    return first


@lru_cache(maxsize=4)
def sentence_enders(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """bool [vocabulary]: the text of the token ends with a full stop."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return np.asarray([text.endswith(".") for text in texts])


class Niah(PromptTask):
    """Needles at depths from the start of the context to its end."""

    title = "Needle in a haystack"
    description = (
        "Real text holds a sentence that says what is best to do in a city; an answer with all key "
        "phrases of the sentence is right. A single needle is the same sentence in all contexts, "
        "so another context's memory knows it too; changed prompts tell whether it was read."
    )
    variants = (CHANGED, ABSENT)

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        options = tools.config.niah
        if options.needles > len(CITIES):
            raise UserError(f"niah.needles: {options.needles} are too many; at most {len(CITIES)}")
        self.needles = options.needles
        # With one question a trial is right or wrong, with several it has a share.
        self.kind = "hits" if self.needles == 1 else "shares"
        self.percents = np.round(np.linspace(0, 100, options.depths)).astype(int).tolist()
        self.ends_sentence = sentence_enders(tools.tokenizer)
        if not self.ends_sentence.any():
            raise UserError(f"{name}: the tokenizer has no token that ends with a full stop")
        check_writes(tools.tokenizer, (*ACTIONS, *PLACES, *WEATHERS), name)
        self.head = encode_prompt(tools.tokenizer, HEAD)
        self.questions = {city: self._question(city) for city in CITIES}
        self.asked = max(map(len, self.questions.values()))
        self.longest = self._longest_needle()
        # The sentence and as much again for what a model says around it.
        self.new_tokens = 2 * self.longest
        self.least = len(self.head) + self.asked + self.new_tokens + self.needles * self.longest + 1
        for length in tools.config.all_lengths:
            self._check(length, self.least)

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        rng = self.rng(length, index)
        plain, changed = draw_facts(self.needles, rng)
        needles, others = (
            [encode_behind(self.tools.tokenizer, ".", fact.needle) for fact in facts]
            for facts in (plain, changed)
        )
        # Room for either, so that the text is the same for both.
        sizes = [max(len(ids), len(other)) for ids, other in zip(needles, others, strict=True)]
        asked = max(len(self.questions[fact.city]) for fact in plain)
        room = length - len(self.head) - asked - self.new_tokens - sum(sizes)
        self._check(length, length - room + 1)
        haystack = self.tools.haystack
        offset = int(rng.integers(0, max(1, len(haystack) - room + 1)))
        percent = self.percents[index % len(self.percents)]
        places = needle_places(haystack, self.ends_sentence, offset, room, sizes, percent)
        labels = {"depth": percent / 100, "positions": places, "distance": room - places[-1]}
        if variant == CHANGED:
            plain, needles = changed, others
        elif variant == ABSENT:
            # The text just goes on.
            needles = [np.empty(0, dtype=np.int64)] * self.needles
            room += sum(sizes)
        pieces: list[Any] = [self.head]
        for start, stop, ids in zip([0, *places[:-1]], places, needles, strict=True):
            pieces += [haystack.piece(offset + start, stop - start), ids]
        pieces.append(haystack.piece(offset + places[-1], room - places[-1]))
        return Trial(
            Context(pieces),
            tuple(
                Question(self.questions[fact.city], fact.phrases, self.new_tokens) for fact in plain
            ),
            labels,
            "\n...\n".join(
                self._excerpt(offset, room, place, ids)
                for place, ids in zip(places, needles, strict=True)
            ),
        )

    def score(self, question: Question, prediction: str) -> float:
        said = " ".join(prediction.split()).casefold()
        return float(all(phrase.casefold() in said for phrase in question.references))

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"needles": self.needles, "new_tokens": self.new_tokens}

    def _check(self, length: int, least: int) -> None:
        if length < least:
            raise UserError(
                f"{self.name}: lengths: {length} tokens are too short for {self.needles} needle(s) "
                f"and a question; use at least {least}"
            )

    def _question(self, city: str) -> np.ndarray:
        question = RETRIEVAL_QUESTION.format(city=city)
        return encode_behind(self.tools.tokenizer, ".", TAIL.format(retrieval_question=question))

    def _longest_needle(self) -> int:
        """No needle has more tokens: the longest of each part, together."""

        def tokens(text: str) -> int:
            return len(encode_behind(self.tools.tokenizer, ".", text))

        parts = (CITIES, ACTIONS, PLACES, WEATHERS)
        longest = [max(words, key=lambda word: tokens(f" {word}")) for words in parts]
        return tokens(Fact(*longest).needle)

    def _excerpt(self, offset: int, room: int, place: int, needle: np.ndarray) -> str:
        """A needle and the text around it."""
        read = self.tools.haystack.read
        before = read(offset + max(0, place - _EXCERPT), offset + place)
        after = read(offset + place, offset + min(room, place + _EXCERPT))
        return self.tools.tokenizer.decode(np.concatenate([before, needle, after]).tolist())
