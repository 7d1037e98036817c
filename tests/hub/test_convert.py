"""A model of another library comes from the Hub: its shapes alone, or as a model of memlm."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlm import MemLMForCausalLM, UserError
from memlm.models.convert import main
from tests.hub.conftest import Client
from tests.hub.server import HubServer, Repository

WORDS = ["someone/llama", "ours", "--revision"]


@pytest.fixture(scope="module")
def llama(hub: HubServer, tmp_path_factory) -> tuple[LlamaForCausalLM, str]:
    """A model in several files, and the revision that has it: main is emptied since."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="4KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repository = hub.repositories["models", "someone/llama"] = Repository()
    revision = repository.commit(files | {"tokenizer.json": b"{}"})
    repository.commit({"README.md": b""})
    weights = [content for name, content in files.items() if name.endswith(".safetensors")]
    assert len(weights) > 2
    hub.objects |= {hashlib.sha256(content).hexdigest(): content for content in weights}
    return model, revision


def weights_in(cache: Path) -> list[Path]:
    return list(cache.rglob("*.safetensors"))


def test_a_dry_run_reads_the_heads_of_the_files(
    llama, client: Client, hub: HubServer, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, llama[1], "--dry_run"]) == 0
    assert "12 tensors" in capsys.readouterr().out
    assert weights_in(client.cache) == []
    assert all("bytes=0-" in request for request in hub.asked("GET", "objects"))


def test_it_is_loaded_and_converted_from_the_revision_that_was_asked_for(
    llama, client: Client, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs, revision = llama
    ids = torch.arange(9)[None]
    loaded = MemLMForCausalLM.from_pretrained("someone/llama", revision=revision)
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert len(weights_in(client.cache)) > 2

    assert main([*WORDS, revision]) == 0
    assert torch.equal(MemLMForCausalLM.from_pretrained("ours")(ids).logits, loaded(ids).logits)
    assert Path("ours/tokenizer.json").is_file() and not Path("ours/README.md").exists()

    client.offline(True)  # what came down once is enough
    assert main(["someone/llama", "again", "--revision", revision]) == 0
    assert Path("again/tokenizer.json").is_file()
    assert main(["someone/llama", "third", "--revision", revision, "--dry_run"]) == 0


def test_what_is_fetched_anew_is_fetched_once(llama, client: Client, hub: HubServer) -> None:
    MemLMForCausalLM.from_pretrained("someone/llama", revision=llama[1])
    hub.requests.clear()
    MemLMForCausalLM.from_pretrained("someone/llama", revision=llama[1], force_download=True)
    assert len(hub.asked("GET /objects/")) == len(weights_in(client.cache))


def test_files_that_were_damaged_on_their_way_are_refused(
    llama, client: Client, hub: HubServer, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.damaged = True
    with pytest.raises(UserError, match="damaged on its way from the Hub"):
        MemLMForCausalLM.from_pretrained("someone/llama", revision=llama[1])
    assert main([*WORDS, llama[1]]) == 2
    assert "damaged on its way from the Hub" in capsys.readouterr().err
    assert not Path("ours").exists()


def test_pickled_weights_are_not_downloaded_to_be_refused(
    llama, client: Client, hub: HubServer, tmp_path: Path, capsys
) -> None:
    files = hub.repositories["models", "someone/llama"].revisions[llama[1]]
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"large"}
    hub.repositories.setdefault(("models", "someone/pickled"), Repository()).commit(pickled)
    for options in ([], ["--dry_run"]):
        assert main(["someone/pickled", str(tmp_path / "ours"), *options]) == 2
        assert "its weights are pickled (pytorch_model.bin)" in capsys.readouterr().err
    assert not hub.asked("GET", "pytorch_model.bin")


def test_what_is_not_there_is_named(llama, client: Client, tmp_path: Path, capsys) -> None:
    cases = {"someone/absent": "someone/absent", "someone/llama": "config.json is missing"}
    for source, named in cases.items():
        assert main([source, str(tmp_path / "ours")]) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
