"""How a case of bad input is written, and what all of them start from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """
model:
  hidden_size: 16
  intermediate_size: 32
  layers:
    - mixer: {type: sliding_attention, window: 16, num_heads: 2}
      ffn: swiglu
data:
  sources: [{type: text, files: [corpus]}]
train:
  output_dir: new
  steps: 2
  length: 32
  tokens_per_step: 64
  warmup_steps: 1
  evaluation_rows: 2
  save_every: 1
  log_every: 1
"""


def nothing() -> None:
    """Nothing to make: the words are wrong."""


def case(name: str, words: tuple[str, ...] | str, *expected: str, make=nothing):
    words = (words,) if isinstance(words, str) else words
    return pytest.param(words, expected, make, id=name)


def source(kind: str, **options) -> str:
    """The override that makes one source of the data."""
    return "--data.sources=" + json.dumps([{"type": kind, **options}])


def text(*files: str, **options) -> str:
    return source("text", files=list(files), **options)


def write(path: str, content: str | bytes) -> Callable[[], None]:
    """Makes a file."""

    def make() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def remove(path: str) -> Callable[[], None]:
    """Removes a file or a folder."""
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def replace(old: str, new: str) -> Callable[[], None]:
    """Changes the config."""

    def make() -> None:
        assert CONFIG.count(old) == 1
        Path("run.yaml").write_text(CONFIG.replace(old, new))

    return make
