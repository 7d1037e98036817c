"""RULER's templates, scores and words, and the search for the size of a prompt."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.errors import UserError
from memlm.evaluation.tasks import words
from memlm.evaluation.tasks.ruler import TEMPLATES, clean, largest_fit, match_all, match_part

# Each as one line of the published constants: template, answer prefix, tokens to generate.
PUBLISHED = {
    "niah": (
        """Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text?""",  # noqa: E501
        """ The special magic {type_needle_v} for {query} mentioned in the provided text are""",
        128,
    ),
    "variable_tracking": (
        """Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text above.""",  # noqa: E501
        """ Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, they are: """,  # noqa: E501
        30,
    ),
    "common_words_extraction": (
        """Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?""",  # noqa: E501
        """ Answer: The top 10 words that appear most often in the list are:""",
        120,
    ),
    "freq_words_extraction": (
        """Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text?""",  # noqa: E501
        """ Answer: According to the coded text above, the three most frequently appeared words are:""",  # noqa: E501
        50,
    ),
    "qa": (
        """Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}""",  # noqa: E501
        """ Answer:""",
        32,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_are_the_published_ones(name: str) -> None:
    found = TEMPLATES[name]
    assert (found.template, found.answer_prefix, found.tokens_to_generate) == PUBLISHED[name]
    assert set(TEMPLATES) == set(PUBLISHED)


def test_an_answer_is_cleaned() -> None:
    assert clean("  \t42\n") == "42"
    assert clean("a\x00b\tc\x1fd") == "a\nb\nc\nd"
    # Control characters that are no white space are found behind the first strip only.
    assert clean("\x01 42 \x02") == "42"
    assert clean("") == ""


def test_match_all_is_the_share_of_the_references() -> None:
    assert match_all("They are 11, 22, 33 and 44.", ["11", "22", "33", "44"]) == 1
    assert match_all("They are 11 and 33.", ["11", "22", "33", "44"]) == 0.5
    assert match_all("ABC", ["abc"]) == match_all("abc", ["ABC"]) == 1
    assert match_all("x1234567y", ["1234567"]) == 1
    assert match_all("", ["1"]) == match_all("2", ["1"]) == 0
    # A control character inside a reference breaks it, as in the published code.
    assert match_all("12\x0034567", ["1234567"]) == 0


def test_match_part_takes_any_reference() -> None:
    assert match_part("in the Garden.", ["kitchen", "garden"]) == 1
    assert match_part("the hall", ["kitchen", "garden"]) == 0


@settings(max_examples=30)
@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_scores_are_shares(prediction: str, references: list[str]) -> None:
    every, some = match_all(prediction, references), match_part(prediction, references)
    assert 0 <= every <= some <= 1
    assert (every > 0) == (some == 1)


@given(
    rate=st.floats(0.6, 40),
    fixed=st.integers(0, 2000),
    bend=st.floats(0.9, 1.2),
    budget=st.integers(0, 4_000_000),
    least=st.integers(0, 50),
    step=st.integers(1, 25),
)
def test_largest_fit(
    rate: float, fixed: int, bend: float, budget: int, least: int, step: int
) -> None:
    calls: list[int] = []

    def tokens_of(size: int) -> int:
        calls.append(size)
        return fixed + int(rate * size**bend)

    found = largest_fit(tokens_of, budget, least, step)
    effort = len(calls)
    if found is None:
        assert tokens_of(least) > budget
        assert effort == 1
    else:
        assert (found - least) % step == 0
        assert tokens_of(found) <= budget < tokens_of(found + step)
        # Small prompts are cheap; of the large ones only few are made.
        assert sum(calls[:effort]) <= 16 * (found + 4 * step)
        assert effort <= 2 * math.log2(budget + 2) + 20


def test_a_prompt_that_does_not_grow_is_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="does not grow"):
        largest_fit(lambda size: 7, 1000, 1)


def test_words() -> None:
    everything = words.all_words()
    assert list(everything) == sorted(set(everything))
    kinds = [words.word_list(kind) for kind in ("noun", "adjective", "verb")]
    assert set(everything) == set().union(*kinds)
    assert all(len(kind) > 500 and list(kind) == sorted(set(kind)) for kind in kinds)
    adjectives, nouns = kinds[1], kinds[0]
    pairs = {words.adjective_noun(np.random.default_rng(seed)) for seed in range(50)}
    assert len(pairs) == 50
    for pair in pairs:
        cuts = [place for place, letter in enumerate(pair) if letter == "-"]
        assert any(pair[:cut] in adjectives and pair[cut + 1 :] in nouns for cut in cuts)


def test_words_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    words.word_list.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.delitem(sys.modules, "wonderwords.assets", raising=False)
    with pytest.raises(UserError, match="needs wonderwords: pip install wonderwords"):
        words.word_list("noun")
