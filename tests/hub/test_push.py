"""What goes up: one commit with model, tokenizer, card and pictures; cards of users stay."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlm
from memlm import MemLMForCausalLM, push
from memlm.data import load_tokenizer
from memlm.models.card import MARK
from tests.hub.conftest import Client
from tests.hub.server import HubServer
from tests.hub.test_pull import same, tiny
from tests.models.attach_tools import MEMORIES, base_model, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a model."""
    folder = tmp_path / "runs" / "mine"
    tiny().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    (folder / "run.json").write_text("[]")
    (folder / "config.yaml").write_text("train: {steps: 5, tokens_per_step: 100}\n")
    (folder / "training.png").write_bytes(b"\x89PNG")
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    (folder / "modeling_memlm.py").unlink()  # as runs of before have none
    return folder


def files(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["models", name]
    return repository.revisions[repository.resolve(revision)]


def test_a_run_is_one_commit(client: Client, hub: HubServer, run: Path, capsys) -> None:
    assert push.main([str(run), "someone/mine", "--private", "--license", "mit"]) == 0
    commit = hub.repositories["models", "someone/mine"].main
    assert capsys.readouterr().out.splitlines()[-1].endswith(commit)
    assert len(hub.asked("POST", "/commit/")) == 1
    assert hub.repositories["models", "someone/mine"].private
    pushed = set(files(hub, "someone/mine"))
    tokenizer = {path.name for path in run.glob("*token*")}
    assert pushed - tokenizer == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_memlm.py",
        "training.png",
    }
    assert tokenizer <= pushed
    there = files(hub, "someone/mine")["model.safetensors"]
    assert there == (run / "model.safetensors").read_bytes()
    card = ModelCard(files(hub, "someone/mine")["README.md"].decode())
    assert card.data.license == "mit" and "5 steps of 100 tokens" in card.content
    assert same(AutoModelForCausalLM.from_pretrained("someone/mine"), tiny())
    assert AutoTokenizer.from_pretrained("someone/mine")("ab").input_ids == [97, 98]
    assert push.main([str(run), "someone/mine", "--revision", "trial"]) == 0
    assert "README.md" in files(hub, "someone/mine", "trial")


def test_saving_may_push(client: Client, hub: HubServer, tmp_path: Path) -> None:
    shards = {"max_shard_size": "40KB"}
    tiny().save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/saved", **shards)
    pushed = files(hub, "someone/saved")
    assert MARK in pushed["README.md"].decode()
    assert {path.name for path in tmp_path.iterdir()} == pushed.keys() - {"README.md"}


def test_the_card_of_a_user_stays(client: Client, hub: HubServer, run: Path) -> None:
    model = MemLMForCausalLM.from_pretrained(run)
    model.push_to_hub("someone/card", commit_message="Mine", license="mit", tags=["first"])
    assert b"- first" in files(hub, "someone/card")["README.md"]
    model.push_to_hub("someone/card", tags=["second"])
    assert b"- second" in files(hub, "someone/card")["README.md"]
    own = files(hub, "someone/card")["README.md"].decode().replace(MARK, "By me.")
    HfApi(endpoint=hub.url).upload_file(
        path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="someone/card"
    )
    assert push.main([str(run), "someone/card"]) == 0
    assert files(hub, "someone/card")["README.md"] == own.encode()


def test_an_attached_memory_of_a_run(client: Client, hub: HubServer, tmp_path: Path) -> None:
    base_model("llama").push_to_hub("someone/llama")
    model = AutoModelForCausalLM.from_pretrained("someone/llama")
    trained(memlm.attach_memory(model, {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}}))
    model.push_to_hub("someone/direct")
    run = tmp_path / "run"
    model.save_pretrained(run)
    assert push.main([str(run), "someone/saved"]) == 0  # without a tokenizer, which is its model's
    load_tokenizer("bytes").save_pretrained(run)
    (run / "run.json").write_text("[]")
    (run / "config.yaml").write_text("train: {steps: 7, tokens_per_step: 100}\n")
    assert push.main([str(run), "someone/memory"]) == 0
    ids = torch.arange(1, 21)[None]
    for name in ("someone/memory", "someone/direct", "someone/saved"):
        card = ModelCard(files(hub, name)["README.md"].decode())
        assert card.data.base_model == "someone/llama"
        assert ("7 steps" in card.content) is (name == "someone/memory")
        assert torch.equal(memlm.load_attached(name)(ids).logits, model(ids).logits)


def test_mistakes_are_one_line(
    client: Client, hub: HubServer, run: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "empty" / "checkpoints" / "step_5").mkdir(parents=True)
    (tmp_path / "empty" / "checkpoints" / "step_5" / "model.safetensors").touch()
    base_model("llama").save_pretrained(tmp_path / "llama")
    MemLMForCausalLM.from_pretrained(run).save_pretrained(tmp_path / "mute")
    cases = [
        ([str(run)], "the following arguments are required: OWNER/NAME"),
        ([str(tmp_path / "absent"), "someone/x"], "absent: no model there"),
        ([str(tmp_path / "empty"), "someone/x"], "did you mean"),
        ([str(tmp_path / "llama"), "someone/x"], "no model of memlm"),
        ([str(tmp_path / "mute"), "someone/x"], "a model without the files of a tokenizer"),
        ([str(run), "some/one/x"], "some/one/x: the Hub did not take it (Repo id must be"),
        ([str(run), "someone/x", "--licence", "mit"], "unrecognized arguments: --licence"),
        ([str(run), "someone/y", "--license", "no-such"], '"license" must be one of [apache'),
    ]
    for words, message in cases:
        assert push.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    client.log_in(None)
    assert push.main([str(run), "someone/x"]) == 2
    assert "there is no token for the Hub; run `hf auth login`" in capsys.readouterr().err
    assert ("models", "someone/x") not in hub.repositories
