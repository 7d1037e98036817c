"""A run that starts from a model on the Hub."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.config import RunConfig, TrainConfig
from memlm.data import ByteTokenizer, DataConfig
from memlm.models.card import write_run_card
from memlm.training import Trainer
from memlm.training.provenance import read_starts
from tests.hub.conftest import Client
from tests.hub.server import HubServer

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize("build", [llama, lambda: MemLMForCausalLM(MemLMConfig(**SIZES))])
def test_the_revision_is_recorded(build, client: Client, hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: PreTrainedModel = build()
    name = f"someone/{base.config.model_type}"
    base.push_to_hub(name)
    ByteTokenizer().push_to_hub(name)
    (tmp_path / "text.txt").write_text("memory " * 400)
    run = RunConfig(
        model={"pretrained": name, "insert": {"memory": "min_gru"}},
        data=DataConfig(
            tokenizer=name, sources=[{"type": "text", "files": [str(tmp_path / "text.txt")]}]
        ),
        train=TrainConfig(
            steps=1,
            length=32,
            tokens_per_step=64,
            evaluation_rows=0,
            output_dir=str(tmp_path / "run"),
        ),
    )
    folder = Trainer(run).run().output_dir
    (start,) = read_starts(folder)
    revision = hub.repositories["models", name].main
    assert start["base"] == {"name": name, "revision": revision}
    assert MemLMForCausalLM.from_pretrained(folder).config.layers[-1]["memory"]
    assert write_run_card(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {name}" in card and f"from the weights of `{name}`" in card
