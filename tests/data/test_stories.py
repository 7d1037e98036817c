"""Stories, judged by a reader of their text alone, and the training rows made of them."""

import numpy as np
import pytest

from memlm.data import ByteTokenizer, DataConfig, PackedDataset
from memlm.data.stories.make import make_story
from memlm.data.stories.story import Story
from memlm.errors import UserError
from tests.data.story_worlds import BEFORE, DROP, GIVE, MOVE, TAKE, possible_answers


def without(facts: list[str], *places: int) -> list[str]:
    return [fact for place, fact in enumerate(facts) if place not in places]


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("sentences", [4, 8, 14])
def test_supporting_facts_are_enough_and_none_can_be_spared(hops: int, sentences: int) -> None:
    for seed in range(12):
        story = make_story(hops, sentences, np.random.default_rng([seed, hops, sentences]))
        assert len(story.facts) == sentences
        assert len(set(story.supporting)) == hops
        assert possible_answers(story.facts, story.question) == {story.answer}
        told = [story.facts[place] for place in story.supporting]
        assert possible_answers(told, story.question) == {story.answer}
        for place in range(hops):
            assert possible_answers(without(told, place), story.question) != {story.answer}
        for places in (*([place] for place in story.supporting), story.supporting):
            left = without(story.facts, *places)
            assert possible_answers(left, story.question) != {story.answer}


def places_of(facts: list[str], thing: str) -> list[str]:
    """Where a thing is, one place after another, as far as moves of its holder tell."""
    where: dict[str, str] = {}
    holder, found = None, []
    for fact in facts:
        if move := MOVE.fullmatch(fact):
            where[move[1]] = move[2]
        elif (taken := TAKE.fullmatch(fact)) and taken[2] == thing:
            holder = taken[1]
        elif (given := GIVE.fullmatch(fact)) and given[2] == thing:
            holder = given[3]
        elif (dropped := DROP.fullmatch(fact)) and dropped[2] == thing:
            holder = None
        if holder in where and found[-1:] != [where[holder]]:
            found.append(where[holder])
    return found


def test_a_thing_has_come_once_to_the_place_it_was_somewhere_else_before() -> None:
    visits = set()
    for seed in range(60):
        story = make_story(3, 16, np.random.default_rng([seed, 8]))
        thing, after = BEFORE.fullmatch(story.question).groups()
        places = places_of(story.facts, thing)
        assert places.count(after) == 1
        visits |= {places.count(place) for place in places}
    assert max(visits) > 1


def test_every_kind_of_event_and_every_place_is_asked_about() -> None:
    answers: dict[str, int] = {}
    supporting: set[str] = set()
    for seed in range(240):
        story = make_story(2 + seed % 2, 12, np.random.default_rng([seed]))
        answers[story.answer] = answers.get(story.answer, 0) + 1
        supporting |= {story.facts[place].split()[1] for place in story.supporting}
    assert len(answers) == 6
    assert max(answers.values()) < 240 / 6 * 1.6
    assert {"took", "gave", "dropped", "went"} <= supporting


def source(**options) -> DataConfig:
    return DataConfig(sources=[{"type": "stories", **options}])


def read_stories(row: dict, tokenizer: ByteTokenizer) -> list[tuple[Story, int]]:
    """The stories of a row, as far as they can be read, and the tokens of each."""
    found = []
    for number in range(1, int(row["segment_ids"].max()) + 1):
        inside = np.flatnonzero(row["segment_ids"] == number)
        ids, labels = row["input_ids"][inside], row["labels"][inside]
        assert row["position_ids"][inside].tolist() == list(range(len(inside)))
        asked = np.flatnonzero(labels != -100)
        assert asked.tolist() == list(range(asked[0], len(inside)))
        assert row["loss_groups"][inside].tolist() == (labels != -100).long().tolist()
        # A target is the next token.
        assert labels[asked[:-1]].tolist() == ids[asked[1:]].tolist()
        answer = bytes(labels[asked].tolist()).decode()
        text = bytes(ids[: asked[0] + 1].tolist()).decode()
        told, _, question = text.partition("\nQuestion: ")
        assert question.endswith("?\nAnswer:")
        facts = [f"{fact}." for fact in told.removesuffix(".").split(". ")]
        assert answer.startswith(" ") and answer.endswith(".")
        story = Story(facts, question.removesuffix("\nAnswer:"), answer[1:-1], [])
        found.append((story, len(inside)))
    return found


def test_rows_hold_whole_stories() -> None:
    tokenizer = ByteTokenizer()
    data = PackedDataset(source(hops=[1, 3], sentences=[4, 10]), tokenizer, "train", 600)
    counts, kinds = set(), set()
    for index in range(12):
        row = data.row(index)
        stories = read_stories(row, tokenizer)
        counts.add(len(stories))
        used = sum(tokens for _, tokens in stories)
        padding = row["segment_ids"] == 0
        assert int(padding.sum()) == 600 - used
        assert (row["labels"][padding] == -100).all() and (row["loss_groups"][padding] == 0).all()
        for story, _ in stories:
            assert 4 <= len(story.facts) <= 10
            assert possible_answers(story.facts, story.question) == {story.answer}
            thing = story.question.startswith("Where is the")
            kinds.add(3 if "before" in story.question else 1 + thing)
    assert kinds == {1, 2, 3}
    assert max(counts) > 1


def test_rows_are_a_function_of_seed_source_and_split() -> None:
    tokenizer = ByteTokenizer()
    config = DataConfig(sources=[{"type": "stories"}, {"type": "stories"}], seed=5)
    data = PackedDataset(config, tokenizer, "train", 700)
    texts = [bytes(data.row(index)["input_ids"].tolist()) for index in range(40)]
    assert len(set(texts)) == 40
    again = PackedDataset(config, tokenizer, "train", 700)
    assert [bytes(again.row(index)["input_ids"].tolist()) for index in (7, 3)] == [
        texts[7],
        texts[3],
    ]
    held_out = PackedDataset(config, tokenizer, "validation", 700)
    assert bytes(held_out.row(0)["input_ids"].tolist()) not in texts


def test_long_stories_are_replaced_by_shorter_ones() -> None:
    tokenizer = ByteTokenizer()
    data = PackedDataset(source(hops=[1, 1], sentences=[4, 500]), tokenizer, "train", 400)
    for index in range(6):
        (first, _), *_ = read_stories(data.row(index), tokenizer)
        assert len(first.facts) <= 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": [1, 4]}, "4 is too large; the most is 3"),
        ({"hops": [2, 1]}, "1 <= lowest <= highest"),
        ({"sentences": [2, 8]}, "2 is too small; the least is 4"),
        ({"sentence": [4, 8]}, "did you mean 'sentences'"),
        ({"hops": 2}, "needs a list of 2 values"),
        ({"sentences": [4, 257]}, "257 is too large for hops of 3; the most is 256"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(**options)


def test_sentences_beyond_any_row_cost_nothing() -> None:
    """Drawn with hardly a chance for one that fits, the shortest fill the rows."""
    options = source(hops=[1, 2], sentences=[4, 10**9])
    data = PackedDataset(options, ByteTokenizer(), "train", 400)
    for index in range(4):
        stories = read_stories(data.row(index), ByteTokenizer())
        assert [len(story.facts) for story, _ in stories] == [4]
    with pytest.raises(UserError, match="401 sentences need more than 401 tokens; rows of 400 t"):
        PackedDataset(source(hops=[1, 2], sentences=[401, 401]), ByteTokenizer(), "train", 400)


def test_rows_that_are_too_short() -> None:
    with pytest.raises(UserError, match="4 sentences need about 1.. tokens; rows of 60 tokens"):
        PackedDataset(source(), ByteTokenizer(), "train", 60)
