"""The data section refuses what it does not know, by name and with the nearest valid name."""

import pytest

from memlm.data import DataConfig
from memlm.data.config import PasskeySource, StdlibSource, TextSource
from memlm.errors import UserError


def test_defaults() -> None:
    config = DataConfig()
    assert config.tokenizer == "bytes"
    assert config.parsed_sources() == [StdlibSource()]


def test_values_as_yaml_gives_them() -> None:
    config = DataConfig(
        sources=[
            {"type": "text", "files": "a.txt", "weight": 2},
            {"type": "passkey", "digits": [5, 30], "files": None},
        ]
    )
    assert config.parsed_sources() == [
        TextSource(files=["a.txt"], weight=2.0),
        PasskeySource(digits=(5, 30)),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "stdlb"}, r"sources\[0\].*'stdlb'; did you mean 'stdlib'\?"),
        ({"type": "zzz"}, "valid: stdlib, text, hub, passkey, mqar"),
        ({"type": "passkey", "digit": [1, 2]}, "'digit'; did you mean 'digits'"),
        ({"type": "text"}, "needs 'files'"),
        ({"type": "text", "files": []}, "files: needs a list"),
        ({"type": "text", "files": [3]}, r"files: needs str, got 3"),
        ({"type": "passkey", "digits": 5}, "digits: needs a list of 2 values"),
        ({"type": "passkey", "digits": [5, 3]}, "lowest <= highest"),
        ({"type": "passkey", "queries": [0, 3]}, "1 <= lowest"),
        ({"type": "mqar", "pairs": "four"}, "pairs: needs int, got 'four'"),
        ({"type": "mqar", "pairs": True}, "pairs: needs int, got True"),
        ({"type": "hub", "dataset": "a", "streaming": 1}, "streaming: needs bool"),
        ({"type": "hub", "dataset": "a", "shuffle_buffer": -1}, "shuffle_buffer must be >= 0"),
        ({"type": "stdlib", "weight": 0}, "weight must be > 0"),
        ({"weight": 1.0}, "needs a mapping with a type"),
        ("stdlib", "needs a mapping with a type"),
    ],
)
def test_bad_sources(source: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(sources=[source])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"seed": -1}, "seed"),
        ({"shards": ""}, "data.shards: needs the name of a folder"),
        ({"tokenize_processes": 0}, "data.tokenize_processes must be at least 1, got 0"),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**values)
