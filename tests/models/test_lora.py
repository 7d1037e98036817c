"""Adapters: exact zero before training, only where they are wanted, gone without a trace."""

import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from memlm import attach_memory, load_memory
from memlm.errors import UserError
from memlm.models.lora import LoraOptions, add_lora, is_lora_name, remove_lora

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2),
    "opt": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
}
FEED_FORWARD = {
    "llama": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "opt": {"fc1", "fc2"},
}
MEMORY = {"type": "gated_delta", "num_heads": 2, "head_dim": 4}
TOKENS = torch.arange(12).view(2, 6)


def make(name: str) -> tuple[PreTrainedModel, dict[int, nn.Module]]:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    decoder = model.get_decoder()
    return model, dict(enumerate(decoder.h if name == "gpt2" else decoder.layers))


def adapted(layer: nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in layer.named_parameters() if is_lora_name(name)}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_start_at_zero_learn_and_go(name):
    model, layers = make(name)
    names = [name for name, _ in model.named_parameters()]
    kind, modules = type(model), list(model.modules())
    with torch.no_grad():
        before = model(TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora({1: layers[1]}, LoraOptions(r=3, alpha=6.0, dropout=0.0))
    assert type(model) is kind and adapted(layers[0]) == set()
    assert adapted(layers[1]) == FEED_FORWARD[name]
    for parameter_name, parameter in layers[1].named_parameters():
        assert parameter.requires_grad == is_lora_name(parameter_name)
    assert torch.equal(model(TOKENS).logits, before)

    optimizer = torch.optim.SGD([p for p in layers[1].parameters() if p.requires_grad], lr=1.0)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, before)
    remove_lora([layers[1]])
    assert [name for name, _ in model.named_parameters()] == names
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_the_output_is_that_of_the_weight_plus_its_low_rank_change():
    _, layers = make("llama")
    options = LoraOptions(r=2, alpha=6.0, target_modules=["q_proj", "mlp.up_proj"])
    add_lora(layers, options)
    layers[0].eval()
    adapter = layers[0].self_attn.q_proj
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    assert a.shape == (2, 16) and b.shape == (16, 2)
    nn.init.normal_(b)
    hidden = torch.randn(5, 16)
    expected = hidden @ (adapter.weight + 3.0 * b @ a).T
    torch.testing.assert_close(adapter(hidden), expected)
    assert adapted(layers[1]) == {"self_attn.q_proj", "mlp.up_proj"}


def test_dropout_acts_in_training_only():
    model, layers = make("llama")
    add_lora(layers, LoraOptions(r=2, dropout=0.5))
    nn.init.normal_(layers[0].mlp.up_proj.lora_B["default"].weight)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_names_that_match_nothing():
    _, layers = make("llama")
    with pytest.raises(
        UserError, match=r"layer 0 has no linear layer 'q_prog'.*self_attn.q_proj.*mlp.down_proj"
    ):
        add_lora(layers, LoraOptions(target_modules=["up_proj", "q_prog"]))
    assert adapted(layers[0]) == set()  # nothing was done by halves
    odd = nn.ModuleDict({"mix": nn.Linear(4, 4)})
    with pytest.raises(UserError, match="linear layers of layer 3: mix"):
        add_lora({3: odd}, LoraOptions())


def test_a_layer_with_adapters_is_refused():
    _, layers = make("llama")
    add_lora(layers, LoraOptions())
    with pytest.raises(UserError, match="layer 0 has adapters already"):
        add_lora(layers, LoraOptions())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, "attach.lora: r is 0"),
        ({"r": 2.5}, "attach.lora: .*'r'.*int"),
        ({"dropout": 1.0}, "attach.lora: dropout is 1.0"),
        ({"layers": [2]}, "attach.lora.layers: there is no layer 2; the model has 0 to 1"),
        ({"layers": []}, "attach.lora: layers is empty"),
        ({"target_modules": []}, "attach.lora: target_modules is empty"),
        ({"rank": 3}, "attach.lora: unknown key 'rank'"),
        ({"target_modules": ["gate"]}, "layer 1 has no linear layer 'gate'"),
    ],
)
def test_impossible_values(lora, message):
    model, _ = make("llama")
    kind, names = type(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        attach_memory(model, {"memory": MEMORY, "lora": lora})
    assert type(model) is kind and [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_output_memory_says_which_layers():
    model, _ = make("llama")
    with pytest.raises(UserError, match="no layer has a memory; name the layers"):
        attach_memory(model, {"output": {"type": "neural_cache"}, "lora": {}})
    attach_memory(model, {"output": {"type": "neural_cache"}, "lora": {"layers": [0]}})
    assert {name.split(".")[2] for name in trained_names(model)} == {"0"}


def trained_names(model: PreTrainedModel) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith("memory.")
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_a_memory(name, tmp_path):
    """As the memory's weights: trained, saved, loaded, and gone with it."""
    model, layers = make(name)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(TOKENS).logits
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)  # as it was frozen before, so afterwards
    asked = [parameter.requires_grad for parameter in model.parameters()]
    attach_memory(model, {"memory": MEMORY, "layers": [1], "lora": {"r": 2, "dropout": 0.0}})
    assert adapted(layers[0]) == set() and adapted(layers[1]) == FEED_FORWARD[name]
    assert len(trained_names(model)) == 2 * len(FEED_FORWARD[name])
    assert all(is_lora_name(name) for name in trained_names(model))
    assert torch.equal(model(TOKENS).logits, before)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step opens the gate
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model(TOKENS).logits
        off = model(TOKENS, use_memory=False).logits
    assert not torch.equal(after, off) and not torch.equal(off, before)
    model.save_pretrained(tmp_path)
    assert any("lora_B" in key for key in load_file(tmp_path / "memory.safetensors"))
    again, _ = make(name)
    again.load_state_dict(start)
    load_memory(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, after)

    model.detach_memory()
    assert model.state_dict().keys() == start.keys()
    assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    _, layers = make("llama")
    with pytest.raises(UserError, match=r"pip install memlm\[peft\]"):
        add_lora(layers, LoraOptions())
