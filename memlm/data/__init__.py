"""Text and recall tasks as fixed-length rows."""

from memlm.data.config import DataConfig
from memlm.data.mqar import MqarExample, make_mqar
from memlm.data.packing import PackedDataset
from memlm.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    byte_level,
    load_tokenizer,
    register_tokenizers,
)

__all__ = [
    "ByteTokenizer",
    "DataConfig",
    "MqarExample",
    "PackedDataset",
    "SentencePieceTokenizer",
    "byte_level",
    "load_tokenizer",
    "make_mqar",
    "register_tokenizers",
]
