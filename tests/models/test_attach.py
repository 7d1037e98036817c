"""A memory is attached to a model of transformers and taken off it again."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from memlm import MemLMCache, MemLMConfig, MemLMForCausalLM, UserError, attach_memory
from memlm.layers.context import CallContext
from memlm.memory import memory_class, memory_names
from memlm.memory.base import AttendingMemory
from memlm.models.decoder_layers import attention_weights, decoder_layers
from memlm.models.key_values import KeyValues
from tests.memory.contract import SPECS
from tests.memory.law_tools import assert_close, run
from tests.models.attach_tools import (
    FAMILIES,
    GROUPED,
    MEMORIES,
    PRODUCT_KEY,
    attached,
    base_model,
    trained,
)

IDS = torch.arange(1, 43).view(2, 21) % 39 + 1


@pytest.mark.parametrize("memory", [*MEMORIES, "product_key"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_is_kept_in_every_bit(family, memory):
    spec = {"type": memory, **{**MEMORIES, "product_key": PRODUCT_KEY}[memory]}
    model = base_model(family)
    before, names = model(IDS, labels=IDS), list(model.state_dict())
    mask = torch.ones_like(IDS)
    mask[0, 15:] = 0  # what a model says at padding is nothing that anyone reads
    padded = model(IDS, attention_mask=mask).logits[mask.bool()]
    generated = model.generate(IDS, max_new_tokens=5, do_sample=False)
    returned = attach_memory(model, {"memory": spec})
    assert returned is model and isinstance(model, type(base_model(family)))
    assert list(model.memory.layers) == ["2"]
    after = model(IDS, labels=IDS)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert torch.equal(model(IDS, attention_mask=mask).logits[mask.bool()], padded)
    assert torch.equal(run(model, IDS)[0], before.logits)  # and with states
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)

    trained(model)
    assert not torch.allclose(model(IDS).logits, before.logits)
    assert torch.equal(model(IDS, use_memory=False).logits, before.logits)
    model.detach_memory()
    assert type(model) is type(base_model(family))
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS).logits, before.logits)


@pytest.mark.parametrize("name", memory_names())
@torch.no_grad()
def test_every_memory_is_attached_or_refused(name):
    spec = SPECS[name][0]
    options = {"memory": {"type": name, **spec.options, **spec.stable}, "layers": [0, 2]}
    model = base_model("llama")
    base = model(IDS).logits
    if issubclass(memory_class(name), AttendingMemory):
        with pytest.raises(UserError, match="has an attention of its own"):
            attach_memory(model, options)
        return
    attach_memory(model, options)
    assert torch.equal(model(IDS).logits, base)
    trained(model)
    whole = model(IDS).logits
    assert (whole - base).abs().max() > 0.1
    first, states = run(model, IDS[:, :9])
    second, _ = run(model, IDS[:, 9:], states)
    assert_close(torch.cat([first, second], 1), whole)


def test_only_the_memory_asks_for_gradients_until_it_is_detached():
    model = base_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attach_memory(model, {"memory": "min_gru", "layers": [1]})
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert asking == {name for name, _ in model.named_parameters() if name.startswith("memory.")}
    model.detach_memory()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not hasattr(model, "memory") and not hasattr(model, "attachment")
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@torch.no_grad()
def test_a_copy_has_a_memory_of_its_own():
    model = attached("llama", "gated_delta")
    copied = copy.deepcopy(model)
    expected = model(IDS).logits
    assert torch.equal(copied(IDS).logits, expected)
    copied.memory.layers["0"].gate.zero_()
    copied.memory.layers["2"].gate.zero_()
    copied.detach_memory()
    assert torch.equal(copied(IDS).logits, base_model("llama")(IDS).logits)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_gets_the_weights_of_its_attention(family, monkeypatch):
    from memlm.memory import GatedDelta

    seen = []
    monkeypatch.setattr(
        GatedDelta, "init_from_attention", lambda self, weights: seen.append(weights)
    )
    model = attach_memory(base_model(family), {"memory": "gated_delta", "layers": [1]})
    (weights,) = seen
    layer = decoder_layers(base_model(family))[1]
    attention = layer.attention(model)
    hidden = torch.randn(1, 5, 32)
    # The values of five tokens seen by the last one, through the weights and through the module.
    value = hidden @ weights.v.T
    if family == "gpt2":
        assert_close(attention.c_attn(hidden)[..., 64:], value + attention.c_attn.bias[64:])
        assert_close(attention.c_proj(value), value @ weights.o.T + attention.c_proj.bias)
        assert torch.equal(weights.q, attention.c_attn.weight[:, :32].T)
        return
    output = attention.out_proj if family == "opt" else attention.o_proj
    bias = attention.v_proj.bias if attention.v_proj.bias is not None else 0
    assert_close(attention.v_proj(hidden), value + bias)
    assert torch.equal(weights.q, attention.q_proj.weight)
    assert torch.equal(weights.o, output.weight)
    assert weights.q.shape == (weights.num_heads * weights.head_dim, 32)
    assert weights.k.shape == (weights.num_kv_heads * weights.head_dim, 32)


@torch.no_grad()
def test_models_whose_attention_takes_its_cache_by_another_name():
    sizes = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes)).eval()
    base = model(IDS).logits
    attach_memory(model, {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}})
    assert torch.equal(model(IDS).logits, base)
    trained(model)
    first, states = run(model, IDS[:, :9])
    second, _ = run(model, IDS[:, 9:], states)
    assert_close(torch.cat([first, second], 1), model(IDS).logits)
    layer = model.attachment.layers[0]
    weights, attention = attention_weights(model, layer), layer.attention(model)
    hidden = torch.randn(1, 5, 32)
    fused = attention.query_key_value(hidden) - attention.query_key_value.bias
    parts = fused.unflatten(-1, (4, 24)).chunk(3, -1)
    for weight, part in zip((weights.q, weights.k, weights.v), parts, strict=True):
        assert_close(hidden @ weight.T, part.flatten(2))


def test_weights_of_unknown_names_are_not_guessed():
    model = base_model("llama")
    attention = model.model.layers[0].self_attn
    attention.query = attention.q_proj
    del attention.q_proj
    assert attention_weights(model, decoder_layers(model)[0]) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"memory": "min_gru", "layer": [1]}, "unknown key 'layer'; did you mean 'layers'"),
        ({"memory": "min_grue"}, "did you mean 'min_gru'"),
        ({"memory": {"type": "min_gru", "gates": 1.0}}, "did you mean 'gate'"),
        ({"layers": [1]}, "attach.memory: expected a name or a mapping"),
        ({"memory": 3}, "attach.memory: expected a name or a mapping"),
        ("knn_cache", "attach: expected a mapping such as {'memory': NAME}, got 'knn_cache'"),
        ({"memory": "min_gru", "layers": [3]}, "no layer 3; the model has 0 to 2"),
        ({"memory": "min_gru", "layers": [-1]}, "no layer -1"),
        ({"memory": "min_gru", "layers": []}, "at least one layer"),
        ({"memory": "min_gru", "layers": [1, 1]}, "each of them once"),
        ({"memory": "min_gru", "layers": ["1"]}, "attach: .*layers"),
        ({"memory": "min_gru", "window": 0}, "attach.window is 0"),
        ({"memory": "knn_cache", "window": 8}, "window of 8 is shorter than the memory's"),
        ({"memory": {"type": "titans", "variant": "mag"}}, "has an attention of its own"),
        ({"memory": {"type": "min_gru", "share": "keys"}}, "cannot be a name of share"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, message):
    model = base_model("llama")
    with pytest.raises(UserError, match=message):
        attach_memory(model, config)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "memory")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_have_one_are_refused():
    small = {"vocab_size": 40, "hidden_size": 32}
    bloom = AutoModelForCausalLM.from_config(BloomConfig(**small, n_layer=2, n_head=4))
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**small, num_hidden_layers=2))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )
    for model in (bloom, mamba, t5):
        with pytest.raises(UserError, match="no standard decoder layers .*; looked for"):
            attach_memory(model, {"memory": "min_gru"})
    chunked = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, attention_chunk_size=8))
    with pytest.raises(UserError, match="layers that keep keys and values of all or the last"):
        attach_memory(chunked, {"memory": "min_gru"})
    own = MemLMForCausalLM(MemLMConfig(vocab_size=40, hidden_size=32))
    with pytest.raises(
        UserError, match="blocks of this library; memlm.insert_memory puts memories"
    ):
        attach_memory(own, {"memory": "min_gru"})
    with pytest.raises(UserError, match="no causal language model of transformers"):
        attach_memory(base_model("llama").model, {"memory": "min_gru"})
    with pytest.raises(UserError, match="no causal language model of transformers"):
        attach_memory(nn.Linear(3, 3), {"memory": "min_gru"})
    with pytest.raises(UserError, match="has a memory already"):
        attach_memory(attached("llama", "gated_delta"), {"memory": "min_gru"})
    named = base_model("llama")
    named.memory = nn.Identity()
    with pytest.raises(UserError, match="an attribute `memory` of its own"):
        attach_memory(named, {"memory": "min_gru"})


@torch.no_grad()
def test_calls_that_cannot_work_are_refused():
    model = attached("llama", "gated_delta")
    with pytest.raises(UserError, match="DynamicCache, which cannot hold memories"):
        model(IDS, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="not both"):
        model(IDS, past_key_values=MemLMCache(), memory_states=model.init_states(2))
    with pytest.raises(ValueError, match="exactly one of"):
        model(IDS, inputs_embeds=torch.zeros(2, 21, 32))
    with pytest.raises(ValueError, match="told apart by segment_ids"):
        model(IDS, attention_mask=torch.ones(2, 1, 21, 21))
    with pytest.raises(UserError, match="ran outside its model"):
        model.model(IDS)
    with pytest.raises(UserError, match="'static' cannot hold memories"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
    weights = torch.ones(2, 5)
    for own in ({"token_weights": weights}, {"z_loss": 1e-4}, {"skip_logits": True}):
        with pytest.raises(UserError, match=f"{next(iter(own))}: the loss of a pretrained model"):
            model(torch.ones(2, 5, dtype=torch.int64), **own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
@torch.no_grad()
def test_the_length_of_a_context(family):
    """A model ends where its positions do; rotary ones go on where attention has a window."""
    limited = attached(family, "gated_delta")
    windowed = attached(family, "gated_delta", window=5)
    long = torch.arange(1, 71)[None] % 39 + 1
    if family == "mistral":  # slides anyway
        assert limited.max_context is windowed.max_context is None
        assert limited.attention_reach == 3 * 6 and windowed.attention_reach == 3 * 4
        return
    assert limited.max_context == 64 and limited.attention_reach is None
    assert windowed.attention_reach == 3 * 4
    states = run(limited, long[:, :60])[1]
    with pytest.raises(UserError, match="70 tokens, but .* allows 64"):
        limited(long[:, 60:], memory_states=states)
    if family == "llama":
        assert windowed.max_context is None
        whole = run(windowed, long)[0]
        first, states = run(windowed, long[:, :60])
        second, states = run(windowed, long[:, 60:], states)
        assert_close(torch.cat([first, second], 1), whole)
        assert states["base"].positions.tolist() == [[66, 67, 68, 69]]
        assert all(keys.shape[2] == 4 for keys in states["base"].keys)
    else:
        assert windowed.max_context == 64
        with pytest.raises(UserError, match="it has no positions beyond"):
            windowed(long)


@torch.no_grad()
def test_rotary_positions_that_change_with_the_length_end_where_they_do():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, rope_parameters=rope))
    attach_memory(model, {"memory": "min_gru", "window": 5})
    assert model.max_context == 64


@torch.no_grad()
def test_a_window_can_be_narrowed_for_a_while():
    model = copy.deepcopy(attached("llama", "knn_cache"))
    expected = attached("llama", "knn_cache", window=5)(IDS).logits
    whole = model(IDS).logits
    model.set_attention_window(5)
    assert_close(model(IDS).logits, expected)
    with pytest.raises(UserError, match="window of 3 is shorter than the memory's segment"):
        model.set_attention_window(3)
    assert_close(model(IDS).logits, expected)
    model.set_attention_window(None)
    assert torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_attention_implementations_agree(family):
    sdpa = attached(family, "knn_cache", window=5)
    eager = copy.deepcopy(sdpa)
    eager.set_attn_implementation("eager")
    segments = torch.tensor([[1] * 8 + [2] * 9 + [0] * 4, [0] * 3 + [1] * 18])
    results = []
    for model in (sdpa, eager):
        first, states = run(model, IDS[:, :13], segment_ids=segments[:, :13])
        second, _ = run(model, IDS[:, 13:], states, segment_ids=segments[:, 13:])
        results.append(torch.cat([first, second], 1)[segments > 0])
    assert_close(*results)


def test_attention_implementations_that_cannot_have_a_mask_are_refused():
    model = attached("llama", "knn_cache")
    states = model.init_states(2)["base"]
    context = CallContext.plain(2, 21)
    windows = [None, 4]
    for name, cap in (("flex_attention", 5), ("flash_attention_2", 5)):
        with pytest.raises(UserError, match=f"'{name}' cannot tell documents packed in a row"):
            KeyValues(states, context, windows, cap, name).mask(0, None, torch.float32)
    flash = KeyValues(states, context, windows, None, "flash_attention_2")
    assert flash.mask(0, None, torch.float32) is flash.mask(1, None, torch.float32) is None


def test_sampling_continues_the_same_memory():
    model = attached("llama", "knn_cache")
    torch.manual_seed(0)
    cached = model.generate(IDS, max_new_tokens=8, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=8, do_sample=True, use_cache=False), cached
    )


@torch.no_grad()
def test_a_second_turn_continues_the_cache():
    model = attached("llama", "knn_cache")
    cache = MemLMCache()
    first = model.generate(IDS, max_new_tokens=5, do_sample=False, past_key_values=cache)
    prompt = torch.cat([first, IDS[:, :6]], 1)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    second = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(second, model.generate(prompt, **options))
    with pytest.raises(UserError, match="continuous batching .* cannot hold memories"):
        model.generate(prompt, cache_implementation="paged", **options)
    with pytest.raises(UserError, match="assisted generation does not work with a memory"):
        model.generate(IDS, max_new_tokens=3, prompt_lookup_num_tokens=2)


@torch.no_grad()
def test_calls_inside_calls():
    """A call in the middle of another one finds its own states and leaves the other's alone."""
    model = copy.deepcopy(attached("llama", "gated_delta"))
    _, states = run(model, IDS[:, :9])
    expected, after = run(model, IDS[:, 9:], states)

    def interrupt(module, args, output):
        handle.remove()
        with pytest.raises(UserError):
            model(IDS.repeat(1, 4))
        model(IDS.flip(0)[:1])

    handle = model.model.layers[1].register_forward_hook(interrupt)
    logits, nested = run(model, IDS[:, 9:], states)
    assert torch.equal(logits, expected)
    for name, state in after.items():
        for key, tensor in state.tensors().items():
            assert torch.equal(nested[name].tensors()[key], tensor)


def test_checkpointing_set_before_attaching_and_kept_after_detaching():
    model = base_model("llama").train()
    model.activation_checkpointing_enable()
    attach_memory(model, {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}})
    plain = base_model("llama").train()
    attach_memory(plain, {"memory": {"type": "knn_cache", **MEMORIES["knn_cache"]}})
    plain.load_state_dict(model.state_dict())
    gradients = []
    for one in (trained(model), trained(plain)):
        one(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in one.memory.parameters()])
    assert all(map(torch.equal, *gradients))
    model.detach_memory()
    assert model.is_activation_checkpointing
    model(IDS, labels=IDS).loss.backward()
    reentrant = {"use_reentrant": True}
    with pytest.raises(UserError, match="use use_reentrant=False"):
        plain.activation_checkpointing_enable(activation_checkpointing_kwargs=reentrant)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=reentrant)
    with pytest.raises(UserError, match="use use_reentrant=False"):
        attach_memory(model, {"memory": "min_gru"})
    assert type(model) is type(base_model("llama"))


@pytest.mark.parametrize("memory", MEMORIES)
def test_autocast_reaches_every_weight_of_the_memory(memory):
    model = copy.deepcopy(attached("llama", memory))
    with torch.autocast("cpu", torch.bfloat16):
        first, states = run(model, IDS[:, :9])
        second, after = run(model, IDS[:, 9:], states)
        (first.float().square().mean() + second.float().square().mean()).backward()
    for name, parameter in model.memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name in model.memory_state_names():
        for key, tensor in after[name].tensors().items():
            assert tensor.dtype == states[name].tensors()[key].dtype


@torch.no_grad()
def test_outputs_are_those_of_transformers():
    model = attached("llama", "gated_delta")
    output = model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 4 and output.memory_states is None
    assert isinstance(output.past_key_values, MemLMCache)
    assert torch.equal(model(IDS, return_dict=False)[0], output.logits)
    assert_close(model(IDS, logits_to_keep=3).logits, output.logits[:, -3:])
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embedded).logits, output.logits)
    assert "position_ids" in inspect.signature(model.forward).parameters


def test_what_the_model_costs():
    model = attached("llama", "gated_delta")
    base = 2 * 10 * sum(p.numel() for p in base_model("llama").parameters() if p.ndim == 2)
    base -= 2 * 10 * model.model.embed_tokens.weight.numel()
    scores = 4 * 55 * 32 * 3
    memories = sum(memory.flops(10) for memory in model.memories().values())
    assert model.flops(10) == base + scores + memories
    assert list(model.memories()) == model.memory_state_names() == ["0.memory", "2.memory"]
