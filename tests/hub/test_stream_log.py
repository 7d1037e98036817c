"""A stream that is written through stays at the commit it began with."""

import json
from pathlib import Path

from tests.hub.server import HubServer
from tests.hub.test_round_trip import run_with

STREAM = """
import json, sys
import torch
from huggingface_hub import create_repo, upload_file
from memlm.data import DataConfig, PackedDataset, load_tokenizer, stream_log
from memlm.errors import UserError

stream_log._FIRST_CHUNK, stream_log._AHEAD = 2000, 0
source = {"type": "hub", "dataset": "someone/text"}

def upload(word):
    rows = "".join(json.dumps({"text": f"{word} {number} " * 20}) + "\\n" for number in range(60))
    upload_file(
        path_or_fileobj=rows.encode(),
        path_in_repo="data/train.jsonl",
        repo_id="someone/text",
        repo_type="dataset",
    )

def rows(shards, name="someone/text"):
    sources = [{"type": "hub", "dataset": name}]
    config = DataConfig(sources=sources, validation_fraction=0.0, shards=shards)
    return PackedDataset(config, load_tokenizer("bytes"), "train", 100)

def same(one, other):
    return torch.equal(one["input_ids"], other["input_ids"])

create_repo("someone/text", repo_type="dataset")
upload("first")
expected = rows(None).batch(range(150))
begun = rows(sys.argv[1]).batch(range(20))
upload("other")
result = {
    "begun": same(begun, rows(sys.argv[1]).batch(range(20))),
    "continued": same(rows(sys.argv[1]).batch(range(150)), expected),
    "anew": same(rows(sys.argv[1] + "2").batch(range(150)), expected),
}
try:
    rows(sys.argv[1], "someone/absent")
except UserError as error:
    result["missing"] = str(error)
print(json.dumps(result))
"""


def test_a_later_commit_changes_no_row(hub: HubServer, tmp_path: Path) -> None:
    result = json.loads(run_with(hub, tmp_path / "home", STREAM, tmp_path / "shards"))
    assert result["begun"] and result["continued"] and not result["anew"]
    assert "someone/absent" in result["missing"]
    assert "\n" not in result["missing"]
