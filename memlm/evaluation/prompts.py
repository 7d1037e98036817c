"""Prompts of any length: a context that is read piece by piece, and questions about it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.encoding import encode, encode_prompt
from memlm.data.encoding import encode_behind as encode_behind
from memlm.data.encoding import well_formed as well_formed
from memlm.errors import UserError

# What a question that follows another one goes on from, see `Trial`.
CONTEXT, QUESTION, ANSWER = "context", "question", "answer"

_BLOCK = 1 << 16


class Piece(Protocol):
    """A stretch of token ids that may lie on disk."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to `stop`, int64."""


@dataclass(frozen=True)
class Ids:
    """A piece that is held as an array."""

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop].astype(np.int64)


class Context:
    """Token ids that are read in order, a segment at a time, and never held whole."""

    def __init__(self, pieces: Sequence[Piece | np.ndarray]):
        self.pieces = [Ids(piece) if isinstance(piece, np.ndarray) else piece for piece in pieces]
        self.ends = np.cumsum([len(piece) for piece in self.pieces], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.pieces else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to `stop` (cut at the end of the context), int64."""
        found = [np.empty(0, dtype=np.int64)]
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop)) + 1
        for piece, end in zip(self.pieces[first:last], self.ends[first:last].tolist(), strict=True):
            begin = end - len(piece)
            found.append(piece.read(max(start - begin, 0), min(stop - begin, len(piece))))
        return np.concatenate(found)

    def fingerprint(self, *more: np.ndarray) -> str:
        """The SHA-256 of all ids and of the arrays `more`, as 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _BLOCK):
            digest.update(self.read(start, start + _BLOCK).tobytes())
        for ids in more:
            digest.update(b"question" + ids.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Question:
    """What is asked after the context.

    Attributes:
        token_ids: int64 [T >= 1], between the context and the answer.
        references: what the answer is compared with.
        new_tokens: most tokens of an answer.
    """

    token_ids: np.ndarray
    references: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Trial:
    """One context and the questions about it.

    Attributes:
        context: what is read, at least one token.
        questions: asked one by one, the first from the state after the context.
        labels: what a report groups by or shows, such as {"depth": 0.5}; JSON values.
        excerpt: the text around what has to be recalled.
        follows: what the other questions go on from: CONTEXT = the state after the context again;
            QUESTION = the state after the question before, what was answered to it is forgotten;
            ANSWER = the state after what the model answered to it. The same for all trials that
            are asked together.
    """

    context: Context
    questions: tuple[Question, ...]
    labels: dict[str, Any] = field(default_factory=dict)
    excerpt: str = ""
    follows: str = CONTEXT

    def fingerprint(self) -> str:
        """The SHA-256 of all token ids, questions included, as 16 hexadecimal digits."""
        return self.context.fingerprint(*(question.token_ids for question in self.questions))


def check_writes(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], task: str) -> None:
    """Raise UserError for a text that does not survive the tokenizer, upper and lower case alike.

    An answer that cannot be written would never be right.
    """
    for text in texts:
        written = tokenizer.decode(encode(tokenizer, text).tolist())
        if text.casefold() not in written.casefold():
            raise UserError(
                f"{task}: the tokenizer cannot write {text!r}; choose a model whose tokenizer can"
            )


def split_prompt(
    tokenizer: PreTrainedTokenizerBase, context: str, questions: Sequence[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of a context (int32) and of each question (int64): together those of the whole text.

    Tokens that reach over the border between context and question belong to the questions.

    Raises:
        ValueError: when context or question has no token of its own.
    """
    wholes = [encode_prompt(tokenizer, context + question) for question in questions]
    alone = encode_prompt(tokenizer, context)
    cut = min(_common(alone, whole) for whole in wholes)
    cut = min(cut, *(len(whole) - 1 for whole in wholes))
    if cut < 1:
        raise ValueError("a prompt needs a context and a question")
    # Copies: views would keep the ids of the whole text for as long as a question lives.
    return alone[:cut].astype(np.int32), [whole[cut:].copy() for whole in wholes]


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading ids are the same."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if len(differs) else size


def text_trial(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    questions: Sequence[tuple[str, Sequence[str]]],
    new_tokens: int,
    labels: dict[str, Any] | None = None,
    excerpt: str = "",
) -> Trial:
    """A trial from text.

    Args:
        tokenizer: of the model.
        context: what comes before the questions, as text.
        questions: the text of each, to the place where the answer starts, and its references.
        new_tokens: most tokens of an answer.
        labels, excerpt: see `Trial`.
    """
    ids, asked = split_prompt(tokenizer, context, [text for text, _ in questions])
    return Trial(
        Context([ids]),
        tuple(
            Question(question, tuple(references), new_tokens)
            for question, (_, references) in zip(asked, questions, strict=True)
        ),
        labels or {},
        excerpt,
    )
