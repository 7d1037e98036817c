"""What the tests of tasks share: a SentencePiece tokenizer, and tools for a config."""

from collections.abc import Callable

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer, load_tokenizer
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.haystack import haystack_documents
from memlm.evaluation.tasks.base import Tools


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """1,000 pieces learned from half a megabyte of the default haystack."""
    lines: list[str] = []
    size = 0
    for text in haystack_documents([]):
        lines += [line for line in text.splitlines() if line.strip()]
        size += len(text)
        if size > 500_000:
            break
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "small"),
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return load_tokenizer(str(folder / "small.model"))


@pytest.fixture
def make_tools() -> Callable[..., Tools]:
    """`make_tools({"lengths": [1024]}, tokenizer=..., distance=...)`: bytes and 0 by default."""

    def make(
        overrides: dict | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        distance: int = 0,
    ) -> Tools:
        config = EvaluationConfig(**(overrides or {}))
        return Tools(config, tokenizer or ByteTokenizer(), distance)

    return make
