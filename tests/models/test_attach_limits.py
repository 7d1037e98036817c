"""What is done to, and asked of, models with attached memories beside calling them."""

import copy

import pytest
import torch
from torch import nn

import memlm
from memlm import attach_memory
from memlm.errors import UserError
from memlm.models import MemLMCache
from memlm.models.decoder_layers import attention_weights, decoder_layers
from tests.models.attach_tools import MEMORIES, attached, base_model

IDS = torch.randint(1, 40, (2, 21), generator=torch.Generator().manual_seed(3))
CACHE = {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}}


@torch.no_grad()
def test_a_closed_gate_keeps_out_what_overflows():
    model = base_model("llama", dtype=torch.float16)
    for layer in model.model.layers:
        layer.input_layernorm.weight *= 1000
    base = model(IDS).logits
    attach_memory(model, {"memory": "linear_attention"})
    assert torch.equal(model(IDS).logits, base)
    (branch,) = model.memory.layers.values()
    branch.gate.fill_(1.0)
    assert not model(IDS).logits.isfinite().all()  # it did overflow


def test_a_closed_gate_has_a_finite_gradient_beside_what_overflows():
    model = base_model("llama")
    attach_memory(model, {"memory": "min_gru"})
    (branch,) = model.memory.layers.values()
    branch.module.register_forward_hook(
        lambda module, args, output: (output[0].index_fill(2, torch.tensor(3), torch.inf), None)
    )
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert torch.equal(loss, base_model("llama")(IDS, labels=IDS).loss)
    assert branch.gate.grad.isfinite().all() and branch.gate.grad[3] == 0
    assert branch.gate.grad.count_nonzero() == 31


def test_detaching_below_adapters_of_others():
    peft = pytest.importorskip("peft")
    model = attach_memory(base_model("llama"), CACHE)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    wrapped(input_ids=IDS)
    model.detach_memory()
    assert type(model) is type(base_model("llama"))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters and all(p.requires_grad for p in adapters)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base_model("llama")(IDS).logits)


def test_models_whose_weights_are_not_there_or_not_their_own(tmp_path):
    peft = pytest.importorskip("peft")
    attach_memory(base_model("llama"), CACHE).save_pretrained(tmp_path)
    adapted = base_model("llama")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    empty = base_model("llama").to("meta")
    for model, message in ((adapted, "has adapters of its own .*lora_A"), (empty, "meta device")):
        with pytest.raises(UserError, match=message):
            attach_memory(model, CACHE)
        with pytest.raises(UserError, match=message):
            memlm.load_memory(model, tmp_path)
        assert not hasattr(model, "memory")


@torch.no_grad()
def test_quantized_projections_are_not_read_as_weights():
    model = base_model("llama")
    layer = decoder_layers(model)[0]
    projection = layer.attention(model).k_proj
    weight = projection.weight
    projection.weight = nn.Parameter(weight.mul(100).to(torch.int8), requires_grad=False)
    assert attention_weights(model, layer) is None
    projection.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert attention_weights(model, layer) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_generation_goes_on_from_states(family):
    model = attached(family, "knn_cache")
    states = model(IDS[:, :13], return_memory_states=True).memory_states
    options = {"max_new_tokens": 6, "do_sample": False}
    continued = model.generate(IDS[:, 13:], past_key_values=MemLMCache(states), **options)
    assert torch.equal(continued, model.generate(IDS, **options)[:, 13:])
    assert not torch.equal(continued, model.generate(IDS[:, 13:], **options))


def test_a_memory_takes_no_tokens_back():
    with pytest.raises(UserError, match="a memory cannot take tokens back"):
        base_model("llama").generate(
            IDS[:1], assistant_model=attached("llama", "gated_delta"), max_new_tokens=4
        )


@pytest.mark.slow
@torch.no_grad()
def test_compiled_calls_carry_states():
    model = copy.deepcopy(attached("llama", "knn_cache"))
    expected = model(IDS).logits
    compiled = torch.compile(model, backend="eager")
    first = compiled(IDS[:, :8], return_memory_states=True)
    second = compiled(IDS[:, 8:], memory_states=first.memory_states)
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(IDS[:, :13]).logits, expected[:, :13])


@torch.no_grad()
def test_states_of_another_memory_are_refused():
    model = attached("llama", "knn_cache")
    states = model.init_states(2)
    for wrong in ({"position": states["position"]}, states | {"1.memory": states["0.memory"]}):
        with pytest.raises(UserError, match="states are those of another model or memory"):
            model(IDS, memory_states=wrong)


def test_a_call_makes_no_second_store(monkeypatch):
    model = attached("llama", "knn_cache")
    states = model(IDS, return_memory_states=True).memory_states
    made, zeros = [], torch.zeros

    def counted(*args, **kwargs):
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", counted)
    model(IDS[:, :1], memory_states=states)
    shape = states["0.memory"].keys.shape
    assert any(tensor.shape[1:] == shape[1:] for tensor in made)  # the names are those of states
    assert all(tensor.is_meta for tensor in made if tensor.shape[1:] == shape[1:])
