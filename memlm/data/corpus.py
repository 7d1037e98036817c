"""Tokenised documents of a source, split into training and validation."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.hashing import text_fraction
from memlm.data.tokenizers import byte_level
from memlm.errors import UserError

if TYPE_CHECKING:
    from memlm.data.shards import ShardedTokens

SPLITS = ("train", "validation")
_BATCH, _BATCH_CHARACTERS = 256, 1 << 21  # documents handed to a tokenizer at once


@dataclass(frozen=True)
class Corpus:
    """Documents back to back: `tokens` [N] (uint16 or int32), `starts` [documents + 1] int64."""

    tokens: "np.ndarray | ShardedTokens"
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document, int64 [documents]."""
        return np.diff(self.starts)


def split_documents(texts: Iterable[str], split: str, fraction: float) -> list[str]:
    """The documents of `split` ("train" or "validation"), in their given order.

    A document is held out when the hash of its text falls below `fraction`, whatever else is in
    the source. Every split gets something to hold: at least one document each when there are two
    or more, and the tail of the document when there is only one. Raises UserError when nothing
    can be held out (fraction 0).
    """
    texts = list(texts)
    check_split(split, fraction)
    if fraction == 0:
        return texts
    if len(texts) == 1:
        cut = max(1, min(len(texts[0]) - 1, round(len(texts[0]) * (1 - fraction))))
        return [texts[0][:cut] if split == "train" else texts[0][cut:]]
    places = [text_fraction(text) for text in texts]
    limit = split_limit(min(places), max(places), fraction)
    return [
        text
        for text, place in zip(texts, places, strict=True)
        if (place < limit) == (split == "validation")
    ]


def split_limit(lowest: float, highest: float, fraction: float) -> float:
    """Documents at a place below it are held out, of two or more from `lowest` to `highest`.

    Equal texts share a place, so copies of a document never sit on both sides of the limit.
    """
    return min(max(fraction, float(np.nextafter(lowest, 1))), highest)


def check_split(split: str, fraction: float) -> None:
    """Raise UserError for an unknown split, or for validation when nothing is held out."""
    if split not in SPLITS:
        raise UserError(f"data split must be 'train' or 'validation', got {split!r}")
    if split == "validation" and fraction == 0:
        raise UserError("data.validation_fraction is 0: there is no validation split")


def in_split(text: str, split: str, fraction: float) -> bool:
    """Whether a streamed document belongs to `split`: by the hash of its text alone."""
    return (text_fraction(text) < fraction) == (split == "validation")


def encode_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    """Token ids of each document that has any: 1-D, uint16 up to 65536 tokens, else int32.

    No special token is added but a leading bos where the tokenizer itself starts texts with one.
    """
    return (ids for ids in encode_texts(texts, tokenizer) if len(ids))


def encode_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """As `encode_documents`, with an empty array for each text without tokens."""
    dtype = token_dtype(tokenizer)
    if byte_level(tokenizer):
        for text in texts:
            yield tokenizer.encode_bytes(text.encode("utf-8", errors="replace"))
        return
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for batch in _batches(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield np.asarray(prefix + ids if ids else ids, dtype=dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of bounded length and size (tokenizers need some 100 bytes a token)."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> type[np.generic]:
    """The smallest of uint16 and int32 that holds every id."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts every text with a bos."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def build_corpus(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, split: str, fraction: float
) -> Corpus:
    """Tokenise one split of a source; raises UserError when it holds no token."""
    check_split(split, fraction)
    return require_text(build_corpora(texts, tokenizer, fraction)[split], split)


def require_text(corpus: Corpus, split: str) -> Corpus:
    """`corpus` of `split`; raises UserError when it holds no token."""
    if not len(corpus.tokens):
        raise UserError(f"data: the {split} split holds no text")
    return corpus


def build_corpora(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, fraction: float
) -> dict[str, Corpus]:
    """Tokenise both splits of a source, divided as `split_documents` does, reading each text once.

    In memory are the tokens once, and a few hundred texts at a time.
    """
    texts = iter(texts)
    first = list(islice(texts, 2))
    if len(first) < 2 and fraction:
        parts = {
            split: split_documents(first, split, fraction) if first else [] for split in SPLITS
        }
        return {split: _divide(*_encode(parts[split], tokenizer))["train"] for split in SPLITS}
    places = array("d")

    def placed() -> Iterator[str]:
        for text in chain(first, texts):
            places.append(text_fraction(text))
            yield text

    if not fraction:
        return _divide(*_encode(chain(first, texts), tokenizer))
    tokens, lengths = _encode(placed(), tokenizer)
    limit = split_limit(min(places), max(places), fraction)
    return _divide(tokens, lengths, np.frombuffer(places) < limit)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[array, np.ndarray]:
    """The tokens of all texts in one array that grew in place, and their lengths."""
    tokens = array("H" if token_dtype(tokenizer) is np.uint16 else "i")
    lengths = array("q")
    for ids in encode_texts(texts, tokenizer):
        tokens.frombytes(ids.view(np.uint8))
        lengths.append(len(ids))
    return tokens, np.frombuffer(lengths, np.int64)


def _divide(
    tokens: array, lengths: np.ndarray, held: np.ndarray | None = None
) -> dict[str, Corpus]:
    """Both splits: documents that are `held` out, and the others, which close up in `tokens`."""
    held = np.zeros(len(lengths), bool) if held is None else held
    starts = _starts(lengths)
    dtype = np.dtype(tokens.typecode)
    with memoryview(tokens) as view:
        parts = [view[starts[i] : starts[i + 1]] for i in np.flatnonzero(held)]
        apart = np.concatenate([np.empty(0, dtype), *(np.frombuffer(p, dtype) for p in parts)])
        for part in parts:
            part.release()
        # Runs of documents that stay, moved down within the same memory.
        edges = np.flatnonzero(np.diff(np.concatenate([[True], held, [True]])))
        size = 0
        for begin, end in starts[edges].reshape(-1, 2):
            view[size : size + end - begin] = view[begin:end]
            size += end - begin
    del tokens[size:]
    train = np.frombuffer(tokens, dtype)
    kept = lengths[~held], lengths[held]
    both = zip((train, apart), kept, strict=True)
    found = [Corpus(part, _starts(count[count > 0])) for part, count in both]
    return dict(zip(SPLITS, found, strict=True))


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
