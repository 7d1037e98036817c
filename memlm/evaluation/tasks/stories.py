"""Stories of a simulated world: questions that need one, two or three facts.

`stories_1` to `stories_3` ask where somebody is, where a thing is, and where it was before (see
memlm.data.stories.make), in the form in which they are training data. A story stands alone, and
settings are its sentences, or its facts stand between the sentences of the haystack, as in BABILong
(Kuratov et al., 2024), and settings are lengths. The facts that an answer follows from, and the
tokens from the last of them to the question, are labels of every trial. "Absent" prompts lack these
facts alone: the other facts stay.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from memlm.data.stories import HOPS, MOST_SENTENCES_OF_THREE
from memlm.data.stories.make import make_story
from memlm.data.stories.story import Story
from memlm.errors import UserError
from memlm.evaluation.babilong.labels import LABELS, is_right
from memlm.evaluation.babilong.scatter import ScatteredFacts
from memlm.evaluation.prompts import Context, Question, Trial, check_writes
from memlm.evaluation.tasks.base import ABSENT, PLAIN, PromptTask, Record, Setting, Tools

_TITLES = {1: "one supporting fact", 2: "two supporting facts", 3: "three supporting facts"}


class Stories(PromptTask):
    """Questions with one number of supporting facts, `stories_1` to `stories_3`."""

    description = (
        "People walk, take, put down and hand over things; an answer counts when it names the "
        "right place and no other. There are six places, so guesses are right at times; absent "
        "prompts, without the facts that the answer follows from, tell how often."
    )
    metric = "accuracy (%)"
    variants = (ABSENT,)

    def __init__(self, name: str, tools: Tools):
        """Check that every story fits.

        Raises:
            UserError: for a length that is too short for one, sentences that are too many for a
                question of three facts, a tokenizer that cannot write.
        """
        super().__init__(name, tools)
        self.hops = int(name.removeprefix("stories_"))
        self.title = f"Stories: {_TITLES[self.hops]}"
        self.options = tools.config.stories
        self.axis = "length (tokens)" if self.options.haystack else "facts (sentences)"
        most = max(self.options.sentences)
        if self.hops == max(HOPS) and most > MOST_SENTENCES_OF_THREE:
            raise UserError(
                f"{name}: stories.sentences: {most} is too large; the most is "
                f"{MOST_SENTENCES_OF_THREE}"
            )
        check_writes(tools.tokenizer, LABELS[self.hops], name)
        self.tokens = ScatteredFacts(tools)
        self.start = self.tokens.start()
        self.new_tokens = max(len(self.tokens.answer(place)) for place in LABELS[self.hops])
        self.all_settings = [self._setting(setting) for setting in self._sizes()]

    def settings(self) -> list[Setting]:
        return self.all_settings

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        """The prompt `index` of a length, or of a number of sentences for stories that stand alone.

        The same story at every length.
        """
        story = self.story(length, index)
        question = self.tokens.question(story.question)
        told = list(range(len(story.facts)))
        if variant == ABSENT:
            told = [place for place in told if place not in story.supporting]
        facts = [story.facts[place] for place in told]
        body = sum(map(len, self.tokens.facts(facts)))
        if self.options.haystack:
            body = length - len(self.start) - len(question) - self.new_tokens
        pieces, starts = self.tokens.pieces(facts, body, self.rng(length, index, 1))
        context = Context([self.start, *pieces])
        labels: dict[str, Any] = {
            "facts": len(facts),
            "supporting": story.supporting,
            "supporting_facts": [story.facts[place] for place in story.supporting],
        }
        shown: list[tuple[str, int]] = []
        if variant == PLAIN:
            places = [starts[place] for place in story.supporting]
            shown = [
                (fact, len(self.start) + place)
                for fact, place in zip(labels["supporting_facts"], places, strict=True)
            ]
            end = places[-1] + len(self.tokens.fact(shown[-1][0], " " if places[-1] else ""))
            labels["distance"] = body - end
            if self.options.haystack:
                labels["depth"] = round(places[-1] / body, 1)
        return Trial(
            context,
            (Question(question, (story.answer,), self.new_tokens),),
            labels,
            self.tokens.excerpt(context, shown, len(self.start)),
        )

    def story(self, length: int, index: int) -> Story:
        """The story of a trial."""
        sentences = length
        if self.options.haystack:
            sentences = self.options.sentences[index % len(self.options.sentences)]
        return make_story(self.hops, sentences, self.rng(sentences, index))

    def score(self, question: Question, prediction: str) -> float:
        asked = self.tools.tokenizer.decode(question.token_ids.tolist())
        return float(is_right(self.hops, asked, question.references[0], prediction))

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """`constant_answer`: the score of giving the most frequent answer always."""
        answers = {
            (record.setting, record.trial): record.answers[0]["references"][0] for record in records
        }
        most = max(Counter(answers.values()).values(), default=0)
        return {"constant_answer": most / max(len(answers), 1)}

    def _sizes(self) -> list[int]:
        return self.tools.config.all_lengths if self.options.haystack else self.options.sentences

    def _setting(self, size: int) -> Setting:
        """That of a length or a number of sentences."""
        config = self.tools.config
        trials = config.trials_at(size) if self.options.haystack else config.trials
        least = max(self._least(self.story(size, index)) for index in range(trials))
        if not self.options.haystack:
            return Setting(str(size), trials, least)
        if size < least:
            raise UserError(
                f"{self.name}: lengths: {size} tokens are too short for stories of "
                f"{max(self.options.sentences)} sentences; use at least {least}"
            )
        return Setting(str(size), trials, size)

    def _least(self, story: Story) -> int:
        """Tokens of the prompt with nothing but the facts, and of the answer."""
        facts = sum(map(len, self.tokens.facts(story.facts)))
        return len(self.start) + facts + len(self.tokens.question(story.question)) + self.new_tokens
