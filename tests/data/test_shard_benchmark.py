"""The comparison with datasets.map runs, and its own checks hold."""

import json
from pathlib import Path

import pytest

from benchmarks import tokenize_text


@pytest.mark.slow
def test_the_tokens_are_those_of_map_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    options = ["--megabytes", "8", "--repeats", "1", "--tokenizers", "bpe", "bytes"]
    tokenize_text.main([*options, "--output", str(tmp_path)])
    (path,) = tmp_path.rglob("tokenize_text.json")
    found = json.loads(path.read_text())
    assert all(entry["equal"] for entry in found["tokenizers"].values())
    # Bytes go a path of their own here, many times faster than any tokenizer call.
    assert found["tokenizers"]["bytes"]["ratio"] > 2
    assert found["killed_half_way"]["identical"]
