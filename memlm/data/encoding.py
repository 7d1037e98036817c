"""Token ids of pieces of text: alone, at the start of a document, behind other text."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.corpus import adds_bos
from memlm.data.tokenizers import byte_level


def well_formed(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which JSON may hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids int64 of `text` alone, without special tokens."""
    if byte_level(tokenizer):
        return tokenizer.encode_bytes(text.encode("utf-8", errors="replace")).astype(np.int64)
    ids = tokenizer(well_formed(text), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids int64 of a text that starts a prompt: with the bos that the tokenizer adds."""
    ids = encode(tokenizer, text)
    if byte_level(tokenizer) or not adds_bos(tokenizer):
        return ids
    return np.concatenate([[tokenizer.bos_token_id], ids])


def encode_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> np.ndarray:
    """Ids int64 of `text` as it stands behind `before`, where they can be told apart.

    SentencePiece writes a space before whatever starts a text; here nothing starts.
    """
    alone, both = encode(tokenizer, before), encode(tokenizer, before + text)
    joins = np.array_equal(both[: len(alone)], alone)
    return both[len(alone) :] if joins else encode(tokenizer, text)
