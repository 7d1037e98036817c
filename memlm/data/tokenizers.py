"""Tokenizers: bytes (the default, no files), SentencePiece models, all AutoTokenizer knows."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizer, SentencePieceBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.errors import UserError

BYTE_VALUES = 256
TOKENIZER_FILE = "tokenizer.json"
_INTEGERS = "integers:"
_MOST_NUMBERS = 1_000_000
_VALID = "valid: 'bytes', 'integers:N', a SentencePiece file ending in .model, a folder or a Hub id"


class ByteTokenizer(PreTrainedTokenizer):
    """One token per UTF-8 byte (ids 0..255) plus `<eos>`, `<bos>` and `<pad>` behind them.

    Encoding adds no special tokens and never reads special tokens out of the text, so
    `decode(encode(text)) == text` for every text. `len(tokenizer)` is 259. Byte sequences that are
    not UTF-8 (a character cut in half) decode to U+FFFD.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        eos_token: str = "<eos>",
        bos_token: str = "<bos>",
        pad_token: str = "<pad>",
        split_special_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            eos_token=eos_token,
            bos_token=bos_token,
            pad_token=pad_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of byte tokens, without the special tokens."""
        return BYTE_VALUES

    def get_vocab(self) -> dict[str, int]:
        """Token string to id: byte b is the character chr(b)."""
        return {chr(byte): byte for byte in range(BYTE_VALUES)} | self.added_tokens_encoder

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids [len(data)] uint16 of raw bytes: the fast path for whole corpora."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text.encode("utf-8", errors="replace").decode("latin-1"))

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < BYTE_VALUES else None

    def _convert_id_to_token(self, index: int) -> str:
        # Ids past the vocabulary exist when a model pads its embedding; they stand for nothing.
        return chr(index) if index < BYTE_VALUES else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of byte tokens; special tokens appear by name."""
        special = self._added_tokens_encoder
        data = b"".join(
            token.encode("utf-8" if token in special else "latin-1") for token in tokens
        )
        return data.decode("utf-8", errors="replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Save the same tokenizer for AutoTokenizer where this class is not known."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory, f"{prefix}{TOKENIZER_FILE}")
        self._as_tokenizers().save(str(path))
        return (str(path),)

    def _as_tokenizers(self) -> Tokenizer:
        """This tokenizer in the `tokenizers` library, which writes each byte as a character."""
        characters = bytes_to_unicode()
        vocab = {characters[byte]: byte for byte in range(BYTE_VALUES)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([token for _, token in sorted(self.added_tokens_decoder.items())])
        return tokenizer


class IntegerTokenizer(PreTrainedTokenizer):
    """Whole numbers below `numbers`, apart by spaces, for tasks that are made of token ids.

    Id n is written "n"; `<eos>`, `<bos>` and `<pad>` stand behind them, `<unk>` for everything
    else. `len(tokenizer)` is numbers + 4.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        numbers: int,
        eos_token: str = "<eos>",
        bos_token: str = "<bos>",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        **kwargs: Any,
    ) -> None:
        self.numbers = numbers
        super().__init__(
            numbers=numbers,
            eos_token=eos_token,
            bos_token=bos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """The numbers, without the special tokens."""
        return self.numbers

    def get_vocab(self) -> dict[str, int]:
        """Written number to number."""
        return {str(number): number for number in range(self.numbers)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        digits = token.isascii() and token.isdigit() and len(token) <= len(str(self.numbers))
        known = digits and str(int(token)) == token and int(token) < self.numbers
        return int(token) if known else self.unk_token_id

    def _convert_id_to_token(self, index: int) -> str:
        # Ids past the vocabulary exist when a model pads its embedding; they stand for nothing.
        return str(index) if index < self.numbers else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The numbers, apart by spaces."""
        return " ".join(filter(None, tokens))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Save the same tokenizer for AutoTokenizer where this class is not known."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory, f"{prefix}{TOKENIZER_FILE}")
        words = models.WordLevel(vocab=self.get_vocab(), unk_token=str(self.unk_token))
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_tokens([token for _, token in sorted(self.added_tokens_decoder.items())])
        tokenizer.save(str(path))
        return (str(path),)


class SentencePieceTokenizer(SentencePieceBackend):
    """A SentencePiece model file; byte-fallback pieces decode to the characters they spell."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text that the pieces spell."""
        return self.sp_model.decode(tokens)


_OWN = (SentencePieceTokenizer, IntegerTokenizer, ByteTokenizer)


def register_tokenizers(config_class: type[PreTrainedConfig]) -> None:
    """Let `AutoTokenizer.from_pretrained` find the classes above; `config_class` is the model's."""
    for tokenizer_class in _OWN:
        AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer named by `spec`.

    `"bytes"` is ByteTokenizer, `"integers:8192"` an IntegerTokenizer of 8192 numbers, a path
    ending in `.model` a SentencePiece model, anything else a folder or Hub id for AutoTokenizer.
    Raises UserError when it cannot be loaded, or when a model is there but no tokenizer:
    AutoTokenizer makes one without a vocabulary then.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith(_INTEGERS):
        return _integers(spec.removeprefix(_INTEGERS))
    if spec.endswith(".model"):
        return _load_sentencepiece(Path(spec))
    try:
        # AutoTokenizer knows these classes beside models of this library only.
        named = get_tokenizer_config(spec).get("tokenizer_class")
        for own in _OWN:
            if named == own.__name__:
                return own.from_pretrained(spec)
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # of a damaged file, tokenizers raises no narrower class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if not isinstance(error, OSError | ValueError | ImportError) or not reason:
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise UserError(f"tokenizer {spec!r} could not be loaded ({reason}); {_VALID}") from error
    if _made_of_nothing(tokenizer):
        raise UserError(f"tokenizer {spec!r}: a model without the files of a tokenizer; {_VALID}")
    return tokenizer


def _made_of_nothing(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether AutoTokenizer has found a model's class of tokenizers, but none of its files."""
    if isinstance(tokenizer, ByteTokenizer):
        return True
    # An empty vocabulary has special tokens, and for some SentencePiece's space.
    return tokenizer.get_vocab().keys() - tokenizer.all_special_tokens <= {"\u2581"}


def _integers(number: str) -> IntegerTokenizer:
    digits = number.isascii() and number.isdigit() and len(number) <= len(str(_MOST_NUMBERS))
    if not (digits and 1 <= int(number) <= _MOST_NUMBERS):
        raise UserError(
            f"tokenizer {_INTEGERS + number!r}: expected how many numbers, from 1 to "
            f"{_MOST_NUMBERS}, as in integers:8192"
        )
    return IntegerTokenizer(int(number))


def _load_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    if not path.is_file():
        raise UserError(f"tokenizer: SentencePiece model file {str(path)!r} does not exist")
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer: {str(path)!r} is not a SentencePiece model") from error
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    named = {name: processor.IdToPiece(index) for name, index in ids.items() if index >= 0}
    # A text that holds the name of a special token is text, as for SentencePiece itself.
    return SentencePieceTokenizer(vocab_file=str(path), split_special_tokens=True, **named)


def byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token is one byte, so that bits per token are bits per byte."""
    return isinstance(tokenizer, ByteTokenizer)
