"""Both splits tokenised in one reading are those that the texts divide into."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import ByteTokenizer
from memlm.data import corpus as corpus_module
from memlm.data.corpus import SPLITS, build_corpora, encode_documents, split_documents

TOKENIZER = ByteTokenizer()


@given(st.lists(st.text(max_size=6), max_size=20), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
@settings(max_examples=150, deadline=None)
def test_one_reading_gives_both_splits(texts: list[str], fraction: float) -> None:
    found = build_corpora(iter(texts), TOKENIZER, fraction)
    assert list(found) == list(SPLITS)
    for split, corpus in found.items():
        documents: list[np.ndarray] = []
        if texts and (fraction or split == "train"):
            chosen = split_documents(texts, split, fraction)
            documents = list(encode_documents(chosen, TOKENIZER))
        assert corpus.lengths.tolist() == [len(document) for document in documents]
        assert corpus.tokens.tolist() == [token for document in documents for token in document]


def test_a_tokenizer_gets_no_more_than_it_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH", 4)
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 10)
    texts = [*"abcdefg", "h" * 30, "i" * 9, "j", "k"]
    batches = list(corpus_module._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    assert [len(batch) for batch in batches] == [4, 4, 2, 1]


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_texts_are_taken_one_by_one(fraction: float) -> None:
    alive = 0

    class Text(str):
        def __new__(cls, number: int) -> "Text":
            nonlocal alive
            alive += 1
            assert alive < 6
            return super().__new__(cls, f"text {number}")

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    corpora = build_corpora((Text(number) for number in range(50)), TOKENIZER, fraction)
    assert sum(len(corpus.lengths) for corpus in corpora.values()) == 50
