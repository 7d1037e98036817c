"""Keys hidden in real text: training rows, and the pieces that the evaluation makes needles of.

Both write the same line, "# The pass key is 12345.", at a line boundary of a piece of real text
cut at an arbitrary offset, and ask by writing the line's beginning again (the passkey task of
Mohtashami & Jaggi, 2023, in the form of a comment inside source code).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data.hashing import uniform
from memlm.errors import UserError

NEEDLE_PREFIX = "# The pass key is "
NEEDLE_SUFFIX = ".\n"
ANSWER_GROUP = 1  # loss group of the digits of a query
_LARGEST_SHARE = 0.8  # of a row that may be needle and query lines


@dataclass(frozen=True)
class PasskeyTokens:
    """The pieces of a needle line as token ids, encoded apart so that they join at any digits."""

    prefix: np.ndarray  # "# The pass key is "
    digits: np.ndarray  # [10], one token per digit
    stop: np.ndarray  # "."
    newline: np.ndarray  # "\n"
    ends_line: np.ndarray  # [vocabulary] bool: the token's text ends in a newline

    @property
    def overhead(self) -> int:
        """Tokens of a needle line without its digits."""
        return len(self.prefix) + len(self.stop) + len(self.newline)

    def line(self, key: np.ndarray) -> np.ndarray:
        """Token ids of "# The pass key is KEY.\\n" for digit values `key` [digits]."""
        return np.concatenate([self.prefix, self.digits[key], self.stop, self.newline])


@lru_cache(maxsize=4)
def passkey_tokens(tokenizer: PreTrainedTokenizerBase) -> PasskeyTokens:
    """The pieces for `tokenizer`; raises UserError when a digit is not a single token of it."""

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def encode_after_digit(text: str) -> np.ndarray:
        # SentencePiece writes a space before whatever starts a text; here nothing starts.
        digit, both = encode("0"), encode("0" + text)
        joins = np.array_equal(both[: len(digit)], digit)
        return both[len(digit) :] if joins else encode(text)

    vocabulary = tokenizer.get_vocab()
    missing = [digit for digit in "0123456789" if digit not in vocabulary]
    if missing:
        raise UserError(
            f"passkey: the tokenizer has no token for the digit {missing[0]!r}; choose one with "
            "single-digit tokens, such as 'bytes'"
        )
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    ends_line = np.asarray([text.endswith("\n") for text in texts])
    if not ends_line.any():
        # A vocabulary without newlines writes no lines: any place will do.
        ends_line[:] = True
    return PasskeyTokens(
        prefix=encode(NEEDLE_PREFIX),
        digits=np.asarray([vocabulary[digit] for digit in "0123456789"], dtype=np.int64),
        stop=encode_after_digit(NEEDLE_SUFFIX[0]),
        newline=encode_after_digit(NEEDLE_SUFFIX[1]),
        ends_line=ends_line,
    )


class PasskeyRows:
    """Training rows of `length` tokens, each hiding one key and asking for it a few times.

    A row is one document: text from a random offset, the needle line, and one to three copies of
    it further on, whose digits are the answers (loss group 1). The needle sits early more often
    than late (squared uniform depth), because long distances are the ones that need practice;
    the last copy comes at the last line boundary of the row and the others anywhere between, so
    all distances up to the row length occur. Fewer digits and copies are drawn where a row is too
    short for more. Row `index` is a pure function of (corpus, length, seed, digits, queries,
    number); `number` is that of the source among those of pass keys, so that two do not draw the
    same rows.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        digits: tuple[int, int],
        queries: tuple[int, int],
        number: int = 0,
    ) -> None:
        self.pieces = passkey_tokens(tokenizer)
        self.length, self.digits, self.queries = length, digits, queries
        self.seed = seed
        if number:
            mixed = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
            self.seed = int(mixed[0])
        self.room = int(_LARGEST_SHARE * length)
        least = (queries[0] + 1) * (self.pieces.overhead + digits[0])
        if least > self.room:
            raise UserError(
                f"passkey rows of {length} tokens are too short: {queries[0]} queries of "
                f"{digits[0]} digits need {int(np.ceil(least / _LARGEST_SHARE))}"
            )
        # A tiny corpus is repeated until a row's text fits behind any offset.
        least = 2 * (length + 1)
        self.tokens = tokens if len(tokens) >= least else np.resize(tokens, least)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64."""
        low, high = self.queries
        # Columns: digits, queries, offset of the text, depth, later queries, the key.
        draws = uniform(self.seed, indices, 4 + high + self.digits[1])
        most = min(self.digits[1], self.room // (low + 1) - self.pieces.overhead)
        digits = self.digits[0] + (draws[:, 0] * (most - self.digits[0] + 1)).astype(np.int64)
        lines = self.pieces.overhead + digits
        most_queries = np.minimum(high, self.room // lines - 1)
        queries = low + (draws[:, 1] * (most_queries - low + 1)).astype(np.int64)
        texts = self.length + 1 - (queries + 1) * lines
        offsets = (draws[:, 2] * (len(self.tokens) - texts + 1)).astype(np.int64)
        # Wanted places in the text: column 0 the needle, then the queries in order; columns
        # beyond a row's queries stay at the end, where the last query belongs anyway.
        depths = np.ones((len(indices), high + 1))
        depths[:, 0] = draws[:, 3] ** 2
        between = depths[:, :1] + draws[:, 4 : 4 + high] * (1 - depths[:, :1])
        asked = np.arange(1, high + 1)[None, :] < queries[:, None]
        depths[:, 1:] = np.sort(np.where(asked, between, 1.0), axis=1)
        wanted = (depths * texts[:, None]).astype(np.int64)
        keys = (draws[:, 4 + high :] * 10).astype(np.int64)
        return self._write(offsets, texts, wanted, queries, keys, digits)

    def _write(
        self,
        offsets: np.ndarray,
        texts: np.ndarray,
        wanted: np.ndarray,
        queries: np.ndarray,
        keys: np.ndarray,
        digits: np.ndarray,
    ) -> dict[str, np.ndarray]:
        rows = len(offsets)
        sequence = np.empty((rows, self.length + 1), dtype=np.int64)
        groups = np.zeros((rows, self.length), dtype=np.int64)
        answer_start = len(self.pieces.prefix)
        for row in range(rows):
            text = self.tokens[offsets[row] : offsets[row] + texts[row]]
            line = self.pieces.line(keys[row, : digits[row]])
            # Before the first line end of the text, its start is the only line boundary.
            starts = np.concatenate([[0], np.flatnonzero(self.pieces.ends_line[text]) + 1])
            places = starts[np.searchsorted(starts, wanted[row], side="right") - 1]
            read = write = 0
            for query in range(queries[row] + 1):
                place = places[query]
                after = write + place - read
                sequence[row, write:after] = text[read:place]
                sequence[row, after : after + len(line)] = line
                if query > 0:
                    # A target sits one position before its token.
                    first = after + answer_start - 1
                    groups[row, first : first + digits[row]] = ANSWER_GROUP
                read, write = place, after + len(line)
            sequence[row, write:] = text[read:]
        positions = np.arange(self.length, dtype=np.int64)
        return {
            "input_ids": sequence[:, :-1],
            "labels": sequence[:, 1:],
            "segment_ids": np.ones((rows, self.length), dtype=np.int64),
            "position_ids": np.broadcast_to(positions, (rows, self.length)),
            "loss_groups": groups,
        }
