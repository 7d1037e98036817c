"""The model around the memories: heads, norms, packing, streaming, limits, transformers' hooks."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, MemLMModel, UserError
from tests.memory.law_tools import build_model

SLIDING = {"type": "sliding_attention", "window": 5, "num_heads": 2, "conv_size": 3}
MEMORY = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
HYBRID = [
    {"mixer": SLIDING, "memory": MEMORY, "ffn": "swiglu"},
    {"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"},
]


@pytest.fixture(scope="module")
def model():
    return build_model(HYBRID)


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_auto_classes_know_the_model(tmp_path):
    config = MemLMConfig(hidden_size=32, layers=HYBRID)
    assert isinstance(AutoModelForCausalLM.from_config(config), MemLMForCausalLM)
    assert isinstance(AutoModel.from_config(config), MemLMModel)
    config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MemLMConfig)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, tmp_path):
    config = MemLMConfig(hidden_size=32, layers=HYBRID, tie_word_embeddings=tied)
    built = MemLMForCausalLM(config)
    shared = built.lm_head.weight is built.model.embed_tokens.weight
    assert shared == tied
    built.save_pretrained(tmp_path)
    loaded = MemLMForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in built.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_outputs_that_the_config_or_the_call_asks_for(model, monkeypatch):
    ids = tokens(1, 6)
    logits, hidden_states = model(
        ids, use_cache=False, output_hidden_states=True, return_dict=False
    )
    assert torch.equal(logits, model(ids).logits) and len(hidden_states) == 3
    assert model(ids).hidden_states is None
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    assert torch.equal(model(ids).hidden_states[-1], hidden_states[-1])


def test_positions_may_jump_within_a_document_and_windows_count_by_them(model):
    ids, positions = tokens(1, 10), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 9, 10, 11]])
    expected = model(ids, position_ids=positions).logits
    states, logits = None, []
    for token, position in zip(ids.split(1, 1), positions.split(1, 1), strict=True):
        options = {"memory_states": states, "return_memory_states": True}
        with torch.no_grad():
            output = model(token, position_ids=position, **options)
        states = output.memory_states
        logits.append(output.logits)
    assert_close(torch.cat(logits, 1), expected)


def test_base_model_checkpoint_loads_into_the_head_model(tmp_path):
    built = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=HYBRID))
    built.save_pretrained(tmp_path)
    ids = tokens(1, 6)
    with torch.no_grad():
        hidden, _ = MemLMModel.from_pretrained(tmp_path).eval()(ids)
        assert torch.equal(built.eval().lm_head(hidden), built(ids).logits)


def test_start_weights_have_the_configured_scale():
    torch.manual_seed(0)
    config = MemLMConfig(hidden_size=128, layers=HYBRID, initializer_range=0.05)
    for name, parameter in MemLMForCausalLM(config).named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        if "mixer.module" in name and name.endswith("proj.weight"):
            assert 0.04 < float(parameter.detach().std()) < 0.06


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_place_of_the_norms(norm):
    built = build_model([{"ffn": "swiglu", "norm": norm}])
    branch = built.model.layers[0].ffn
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)

    def rms(x, layer):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.weight

    inside = rms(hidden, branch.norm) if norm != "post" else hidden
    expected = branch.module(inside)
    if norm != "pre":
        expected = rms(expected, branch.post_norm)
    block = built.model.layers[0]
    _, states = built.model(inputs_embeds=hidden)
    assert list(states) == ["position"]
    final = rms(hidden + expected, built.model.norm)
    assert_close(built.model(inputs_embeds=hidden)[0], final)
    assert len(block.branches()) == 1


def test_parallel_memory_reads_the_mixers_input():
    for parallel in (False, True):
        built = build_model([{"mixer": SLIDING, "memory": {**MEMORY, "parallel": parallel}}])
        block = built.model.layers[0]
        with torch.no_grad():
            block.mixer.module.o_proj.weight.zero_()
            first = built(tokens(1, 8)).logits
            block.mixer.module.o_proj.weight += 1
            hidden = {}
            block.memory.register_forward_hook(
                lambda module, args, output, store=hidden: store.update(given=args[0])
            )
            second = built(tokens(1, 8)).logits
            embedded = built.model.embed_tokens(tokens(1, 8))
        assert torch.equal(hidden["given"], embedded) == parallel
        assert not torch.allclose(first, second)


def test_loss_is_the_shifted_cross_entropy(model):
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, 4:6] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(out.loss.double(), expected, 1e-6)


def test_logits_to_keep(model):
    ids = tokens(2, 9)
    everything = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, everything[:, -2:])
    kept = torch.tensor([0, 4])
    assert_close(model(ids, logits_to_keep=kept).logits, everything[:, kept])


def test_embeddings_in_place_of_tokens(model):
    ids = tokens(2, 9)
    embedded = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_resized_embeddings_keep_the_old_tokens():
    built = build_model(HYBRID)
    ids = tokens(1, 9)
    before = built(ids).logits
    built.resize_token_embeddings(48)
    assert built.config.vocab_size == 48
    after = built(ids).logits
    assert after.shape[-1] == 48
    assert_close(after[..., :40], before)


def test_states_come_back_only_when_wanted(model):
    ids = tokens(1, 4)
    assert model(ids, use_cache=False).memory_states is None
    out = model(ids, return_memory_states=True)
    assert out.past_key_values is None
    assert list(out.memory_states) == ["position", "0.mixer", "0.memory", "1.mixer"]
    assert model.memory_state_names() == ["0.memory"]
    assert list(model.memories()) == ["0.memory"]
    assert out.memory_states.keys() == model.init_states(1).keys()
    assert model(ids, memory_states=out.memory_states).memory_states is not None


def test_states_and_cache_together_are_refused(model):
    cache = model(tokens(1, 4)).past_key_values
    with pytest.raises(ValueError, match="not both"):
        model(tokens(1, 4), past_key_values=cache, memory_states=model.init_states(1))


def test_positions_restart_with_each_document_and_continue_across_calls(model):
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 3, 3]])
    ids = tokens(1, 8)
    _, states = model.model(ids, segment_ids=segments)
    assert states["position"].next_position.tolist() == [2]
    _, states = model.model(tokens(1, 3), memory_states=states)
    assert states["position"].next_position.tolist() == [5]
    restarted = torch.tensor([[0, 1]])
    _, states = model.model(tokens(1, 2), position_ids=restarted, memory_states=states)
    assert states["position"].next_position.tolist() == [2]


def test_carried_document_ends_where_a_position_is_zero(model):
    ids = tokens(1, 12)
    _, states = model.model(ids[:, :6])
    hidden, _ = model.model(ids[:, 6:], position_ids=torch.arange(6)[None], memory_states=states)
    assert_close(hidden, model.model(ids[:, 6:])[0])


def test_call_of_only_padding_changes_nothing(model):
    ids = tokens(2, 6)
    _, states = model.model(ids)
    for length in (0, 3):
        padding = torch.zeros(2, length, dtype=torch.int64)
        out = model(
            padding, attention_mask=padding, memory_states=states, return_memory_states=True
        )
        assert out.logits.shape == (2, length, 40)
        for name, state in states.items():
            after = out.memory_states[name].tensors()
            assert all(torch.equal(after[key], tensor) for key, tensor in state.tensors().items())


def test_mask_may_cover_the_past(model):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    _, states = model.model(ids[:, :6], attention_mask=mask[:, :6])
    short, _ = model.model(ids[:, 6:], attention_mask=mask[:, 6:], memory_states=states)
    long, _ = model.model(ids[:, 6:], attention_mask=mask, memory_states=states)
    assert torch.equal(short, long)


def test_four_dimensional_masks_are_refused(model):
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


def test_attention_implementations_agree():
    ids = tokens(2, 14)
    segments = torch.ones_like(ids)
    segments[0, 5:] = 2
    segments[1, :3] = 0
    sdpa = build_model(HYBRID)
    assert sdpa.config._attn_implementation == "sdpa"
    expected = sdpa(ids, segment_ids=segments).logits
    sdpa.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "eager"
    actual = sdpa(ids, segment_ids=segments).logits
    assert not torch.equal(actual, expected)  # another implementation indeed
    valid = segments > 0
    assert_close(actual[valid], expected[valid], 1e-5)


def test_context_limit_of_full_attention():
    config = {"vocab_size": 40, "hidden_size": 32, "max_position_embeddings": 8}
    full = MemLMForCausalLM(MemLMConfig(layers=HYBRID, **config))
    assert full.max_context == 8
    states = full(tokens(1, 8), return_memory_states=True).memory_states
    with pytest.raises(UserError, match="9 tokens.*full attention allows 8"):
        full(tokens(1, 9))
    with pytest.raises(UserError, match="max_position_embeddings"):
        full(tokens(1, 1), memory_states=states)
    with pytest.raises(UserError, match="full attention allows 8"):
        full.generate(tokens(1, 6), max_new_tokens=5, eos_token_id=None)
    padded = torch.zeros(1, 12, dtype=torch.int64)
    padded[:, 5:] = 1
    full(padded, attention_mask=padded)  # padding does not count
    windowed = MemLMForCausalLM(MemLMConfig(layers=HYBRID[:1], **config))
    assert windowed.max_context is None
    windowed(tokens(1, 20))


def test_attention_window_can_be_capped_and_restored():
    built = build_model([{"repeat": 2, "mixer": SLIDING}, {"mixer": "attention"}])
    narrow = build_model([{"repeat": 2, "mixer": {**SLIDING, "window": 2}}, {"mixer": "attention"}])
    ids = tokens(1, 12)
    wide = built(ids).logits
    built.set_attention_window(2)
    assert_close(built(ids).logits, narrow(ids).logits)
    built.set_attention_window(100)
    assert_close(built(ids).logits, wide)
    built.set_attention_window(2)
    built.set_attention_window(None)
    assert_close(built(ids).logits, wide)


def test_window_below_the_segment_of_a_memory_is_refused():
    cache = {"type": "knn_cache", "segment": 4, "capacity": 8, "top_k": 2}
    built = MemLMForCausalLM(
        MemLMConfig(hidden_size=32, layers=[{"mixer": {**SLIDING, "window": 8}, "memory": cache}])
    )
    built.set_attention_window(4)
    with pytest.raises(UserError, match="layer 0: an attention window of 3 .* segment"):
        built.set_attention_window(3)


def test_layers_that_share_must_agree():
    table = {"type": "product_key", "num_keys": 4, "top_k": 2, "share": "table"}
    layers = [{"ffn": table}, {"ffn": {**table, "num_keys": 5}}]
    with pytest.raises(UserError, match="share 'table' differ"):
        MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers))
    for name in ("values", "a.b"):
        config = MemLMConfig(hidden_size=32, layers=[{"ffn": {**table, "share": name}}])
        with pytest.raises(UserError, match="cannot be a name of share"):
            MemLMForCausalLM(config)
    shared = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=[{"ffn": table}] * 3))
    assert list(shared.model.shared) == ["table"]
    tables = [name for name, value in shared.named_parameters() if value.shape[0] == 16]
    assert len(tables) == 1


def test_flops_grow_linearly_with_a_window_and_are_positive():
    windowed = build_model(HYBRID[:1])
    assert windowed.flops(400) < 2.1 * windowed.flops(200)
    full = build_model(HYBRID)
    assert full.flops(400) > 2 * full.flops(200) > 0


def test_gate_starts_where_the_config_says_and_learns():
    built = build_model([{"mixer": SLIDING, "memory": {**MEMORY, "gate": 0.0}, "ffn": "swiglu"}])
    gate = built.model.layers[0].memory.gate
    assert torch.equal(gate, torch.zeros_like(gate))
    ids = tokens(1, 9)
    built(ids, labels=ids).loss.backward()
    assert gate.grad.abs().min() > 0


def test_checkpointing_through_transformers_switch(model):
    built = build_model(HYBRID).train()
    built.gradient_checkpointing_enable()
    assert built.is_gradient_checkpointing
    ids = tokens(1, 9)
    built(ids, labels=ids).loss.backward()
    checkpointed = {name: value.grad.clone() for name, value in built.named_parameters()}
    built.zero_grad()
    built.gradient_checkpointing_disable()
    built(ids, labels=ids).loss.backward()
    for name, value in built.named_parameters():
        assert_close(checkpointed[name], value.grad)
