"""What comes down from the Hub is what went up, or a clear error."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from tests.hub.conftest import Client
from tests.hub.server import HubServer

LAYERS = [
    {"mixer": {"type": "sliding_attention", "window": 8}, "memory": "gated_delta", "ffn": "swiglu"},
    {"mixer": "attention", "ffn": "swiglu"},
]


def tiny(seed: int = 0) -> MemLMForCausalLM:
    """A model whose weights are none that initialisation gives."""
    torch.manual_seed(seed)
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=LAYERS, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def same(one: MemLMForCausalLM, other: MemLMForCausalLM) -> bool:
    """Whether all weights are equal in every bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first
    )


@pytest.fixture(scope="module")
def model() -> MemLMForCausalLM:
    return tiny()


def test_a_pushed_model_is_listed_and_comes_back(
    model: MemLMForCausalLM, client: Client, hub: HubServer
) -> None:
    address = model.push_to_hub("someone/tiny")
    api = HfApi(endpoint=hub.url)
    assert address.endswith(hub.repositories["models", "someone/tiny"].main)
    assert "someone/tiny" in [info.id for info in api.list_models(author="someone")]
    assert sorted(api.list_repo_files("someone/tiny")) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_memlm.py",
    ]
    assert hub.asked("POST", "/commit/main") and len(hub.asked("POST", "/commit/")) == 1
    assert hub.asked("PUT /objects/") and hub.asked("objects/verify")
    assert same(AutoModelForCausalLM.from_pretrained("someone/tiny"), model)


def test_weights_in_several_files(model: MemLMForCausalLM, client: Client, hub: HubServer) -> None:
    model.push_to_hub("someone/sharded", max_shard_size="40KB")
    files = HfApi(endpoint=hub.url).list_repo_files("someone/sharded")
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert "model.safetensors.index.json" in files
    assert same(AutoModelForCausalLM.from_pretrained("someone/sharded"), model)


def test_a_download_that_breaks_off_goes_on(
    model: MemLMForCausalLM, client: Client, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_to_hub("someone/broken")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what may be lost: else 10 MB
    hub.break_off = 10_000
    assert same(AutoModelForCausalLM.from_pretrained("someone/broken"), model)
    fetched = hub.asked("GET /objects/")
    assert len(fetched) == 2 and fetched[1].endswith("bytes=10000-")


def test_files_that_are_whole_are_not_fetched_again(
    model: MemLMForCausalLM, client: Client, hub: HubServer
) -> None:
    model.push_to_hub("someone/parts", max_shard_size="41KB")
    parts = hub.repositories["models", "someone/parts"]
    last = max(name for name in parts.revisions[parts.main] if name.endswith(".safetensors"))
    content = parts.revisions[parts.main][last]
    oid = hashlib.sha256(content).hexdigest()
    del hub.objects[oid]
    with pytest.raises(OSError, match="someone/parts"):
        AutoModelForCausalLM.from_pretrained("someone/parts")
    assert len({*hub.asked("GET /objects/")}) > 2
    hub.objects[oid] = content
    hub.requests.clear()
    assert same(AutoModelForCausalLM.from_pretrained("someone/parts"), model)
    assert hub.asked("GET /objects/") == [f"GET /objects/{oid}"]


def test_a_damaged_download_is_refused_and_forgotten(
    model: MemLMForCausalLM, client: Client, hub: HubServer
) -> None:
    model.push_to_hub("someone/damaged")
    hub.damaged = True
    with pytest.raises(UserError, match="model.safetensors was damaged on its way from the Hub"):
        AutoModelForCausalLM.from_pretrained("someone/damaged")
    hub.damaged = False
    assert same(AutoModelForCausalLM.from_pretrained("someone/damaged"), model)
    # Files are read for this once.
    (mark,) = client.cache.glob("*/.memlm_checked/" + "?" * 64)
    before = mark.stat().st_mtime_ns
    AutoModelForCausalLM.from_pretrained("someone/damaged")
    assert mark.stat().st_mtime_ns == before
    # One that changed in the cache is another file.
    blob = mark.parents[1] / "blobs" / mark.name
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        AutoModelForCausalLM.from_pretrained("someone/damaged")


def test_revisions(client: Client, hub: HubServer) -> None:
    older, newer, other = tiny(1), tiny(2), tiny(3)
    older.push_to_hub("someone/revised")
    first = hub.repositories["models", "someone/revised"].main
    HfApi(endpoint=hub.url).create_tag("someone/revised", tag="v1")
    newer.push_to_hub("someone/revised")
    other.push_to_hub("someone/revised", revision="trial")
    load = AutoModelForCausalLM.from_pretrained
    assert same(load("someone/revised"), newer)
    assert same(load("someone/revised", revision=first), older)
    assert same(load("someone/revised", revision="v1"), older)
    assert same(load("someone/revised", revision="trial"), other)
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        load("someone/revised", revision="v2")


def test_what_is_missing_is_named(
    model: MemLMForCausalLM, client: Client, hub: HubServer, tmp_path: Path
) -> None:
    api = HfApi(endpoint=hub.url)
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(OSError, match="someone/absent is not a local folder and is not a valid"):
        load("someone/absent")
    model.config.save_pretrained(tmp_path)
    api.create_repo("someone/no-weights")
    api.upload_folder(repo_id="someone/no-weights", folder_path=tmp_path)
    with pytest.raises(OSError, match="someone/no-weights does not appear to have a file named"):
        load("someone/no-weights")
    api.create_repo("someone/no-config")
    with pytest.raises((OSError, ValueError), match="someone/no-config"):
        load("someone/no-config")


def test_a_private_model_wants_a_token(
    model: MemLMForCausalLM, client: Client, hub: HubServer
) -> None:
    model.push_to_hub("someone/private", private=True)
    load = AutoModelForCausalLM.from_pretrained
    assert same(load("someone/private"), model)
    client.use_cache(client.cache / "other")
    client.log_in(None)
    with pytest.raises(OSError, match="private repository"):
        load("someone/private")
    with pytest.raises(OSError, match="private repository"):
        load("someone/private", token="hf_other")
    assert same(load("someone/private", token="hf_any"), model)
    with pytest.raises(UserError, match="there is no token for the Hub; run `hf auth login`"):
        model.push_to_hub("someone/private")
    with pytest.raises(UserError, match="someone/private: the Hub did not take it"):
        model.push_to_hub("someone/private", token="hf_other")


def test_offline(model: MemLMForCausalLM, client: Client, hub: HubServer) -> None:
    model.push_to_hub("someone/cached")
    load = AutoModelForCausalLM.from_pretrained
    client.offline(True)
    with pytest.raises(OSError, match="couldn't connect|offline mode|cached"):
        load("someone/cached")
    client.offline(False)
    load("someone/cached")
    client.offline(True)
    hub.requests.clear()
    assert same(load("someone/cached"), model)
    assert hub.requests == []
    with pytest.raises(UserError, match=re.escape("someone/cached: the Hub did not take it")):
        model.push_to_hub("someone/cached")
    client.offline(False)
    assert same(load("someone/cached", local_files_only=True), model)
