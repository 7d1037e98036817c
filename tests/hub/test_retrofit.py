"""A run that starts from a model on the Hub."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memlm import MemLMConfig, MemLMForCausalLM, load_attached
from memlm.config import RunConfig, TrainConfig
from memlm.data import ByteTokenizer, DataConfig
from memlm.models.attached_files import read_attached_config
from memlm.models.card import write_run_card
from memlm.training import Trainer
from memlm.training.provenance import read_starts
from tests.hub.conftest import Client
from tests.hub.server import HubServer

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2))


def one_step(folder: Path, base: PreTrainedModel, memory: dict) -> tuple[Path, str]:
    """A run from `base`, which goes to the Hub before: its folder, and what it is called there."""
    name = f"someone/{base.config.model_type}"
    base.push_to_hub(name)
    ByteTokenizer().push_to_hub(name)
    (folder / "text.txt").write_text("memory " * 400)
    run = RunConfig(
        model={"pretrained": name, **memory},
        data=DataConfig(
            tokenizer=name, sources=[{"type": "text", "files": [str(folder / "text.txt")]}]
        ),
        train=TrainConfig(
            steps=1,
            length=32,
            tokens_per_step=64,
            evaluation_rows=0,
            output_dir=str(folder / "run"),
        ),
    )
    return Trainer(run).run().output_dir, name


@pytest.mark.parametrize(
    "build",
    [llama, pytest.param(lambda: MemLMForCausalLM(MemLMConfig(**SIZES)), marks=pytest.mark.slow)],
)
def test_the_revision_is_recorded(build, client: Client, hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, name = one_step(tmp_path, build(), {"insert": {"memory": "min_gru"}})
    (start,) = read_starts(folder)
    revision = hub.repositories["models", name].main
    assert start["base"] == {"name": name, "revision": revision}
    assert MemLMForCausalLM.from_pretrained(folder).config.layers[-1]["memory"]
    assert write_run_card(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {name}" in card and f"from the weights of `{name}`" in card


def test_an_attached_memory_names_the_revision_of_its_model(
    client: Client, hub: HubServer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder, name = one_step(tmp_path, llama(), {"attach": {"memory": "min_gru"}})
    revision = hub.repositories["models", name].main
    assert read_attached_config(folder)["base_model"]["revision"] == revision
    torch.manual_seed(1)
    llama().push_to_hub(name)  # other weights: what is recorded still finds those before
    again = load_attached(folder)
    again.save_pretrained(tmp_path / "again")
    assert read_attached_config(tmp_path / "again")["base_model"]["revision"] == revision
