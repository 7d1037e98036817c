"""Blocks with states of constant size are compiled once for the prompt and once for a token."""

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from memlm.models import MemLMConfig, MemLMForCausalLM

LAYERS = {
    "gated_delta": {"mixer": {"type": "gated_delta", "num_heads": 2, "head_dim": 8}},
    "retention": {"mixer": {"type": "retention", "num_heads": 2}},
    "min_gru": {"mixer": "min_gru"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_with_compiled_blocks(name):
    torch.manual_seed(0)
    layers = [{"repeat": 2, "ffn": "swiglu", **LAYERS[name]}]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    model = MemLMForCausalLM(MemLMConfig(**sizes, layers=layers, initializer_range=0.3)).eval()
    prompts = [torch.randint(64, (2, 11)) for _ in range(3)]
    expected = [generate(model, prompt) for prompt in prompts]
    torch.compiler.reset()
    counters.clear()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    first = generate(model, prompts[0])
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    with dynamo_config.patch(error_on_recompile=True):
        found = [generate(model, prompt) for prompt in prompts]
    assert counters["stats"]["unique_graphs"] == made
    assert torch.equal(first, found[0])
    for tokens, wanted in zip(found, expected, strict=True):
        assert torch.equal(tokens, wanted)


def generate(model: MemLMForCausalLM, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False)
