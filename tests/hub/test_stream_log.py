"""A data set streams from the Hub; a stream that is written through stays at its first commit."""

import json

import pytest

from tests.hub.server import HubServer
from tests.hub.test_round_trip import run_with

STREAM = """
import json, sys
import torch
from huggingface_hub import create_repo, upload_file
from memlm.data import DataConfig, PackedDataset, load_tokenizer, stream_log
from memlm.data.config import HubSource
from memlm.data.hub import hub_documents
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
documents = list(hub_documents(HubSource("someone/text"), seed=0))
expected = rows(None).batch(range(150))
begun = rows(sys.argv[1]).batch(range(20))
upload("other")
result = {
    "documents": documents,
    "begun": same(begun, rows(sys.argv[1]).batch(range(20))),
    "continued": same(rows(sys.argv[1]).batch(range(150)), expected),
    "anew": same(rows(sys.argv[1] + "2").batch(range(150)), expected),
}
for name, call in {
    "missing": lambda: list(hub_documents(HubSource("someone/absent"), seed=0)),
    "missing in shards": lambda: rows(sys.argv[1], "someone/absent"),
}.items():
    try:
        call()
    except UserError as error:
        result[name] = str(error)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(hub: HubServer, tmp_path_factory) -> dict:
    """What a process says that has an HF_HOME of its own, so nothing comes from a cache."""
    folder = tmp_path_factory.mktemp("stream")
    return json.loads(run_with(hub, folder / "home", STREAM, folder / "shards"))


def test_a_data_set_streams(result: dict) -> None:
    assert result["documents"] == [f"first {number} " * 20 for number in range(60)]


def test_a_later_commit_changes_no_row(result: dict) -> None:
    assert result["begun"] and result["continued"] and not result["anew"]


@pytest.mark.parametrize("reading", ["missing", "missing in shards"])
def test_a_missing_one_is_named_in_one_line(result: dict, reading: str) -> None:
    assert "someone/absent" in result[reading] and "\n" not in result[reading]
