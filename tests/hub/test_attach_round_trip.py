"""A model goes to the Hub, a memory for it too, and both come back together bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlm
from memlm import UserError
from tests.hub.conftest import Client
from tests.models.attach_tools import MEMORIES, base_model, trained


def test_a_memory_comes_back_from_the_hub(client: Client) -> None:
    base_model("llama").push_to_hub("someone/base")
    model = AutoModelForCausalLM.from_pretrained("someone/base")
    trained(memlm.attach_memory(model, {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}}))
    model.push_to_hub("someone/memory")
    client.use_cache(client.cache / "other")

    ids = torch.arange(1, 21)[None]
    loaded = memlm.load_attached("someone/memory")
    assert list(loaded.memory.layers) == ["2"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModelForCausalLM.from_pretrained("someone/base")
    again = memlm.load_memory(base, "someone/memory", revision="main")
    tokens = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    for source, message in (
        ("someone/absent", "no such memory was found on the Hub"),
        ("someone/base", r"no attached memory there \(it has no memory_config.json\)"),
    ):
        with pytest.raises(UserError, match=message):
            memlm.load_attached(source)
