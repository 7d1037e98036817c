"""An output memory behind the head: the config, the model around it, the interpolation."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.memory.output_memory import Evidence, OutputMemoryConfig, interpolate
from memlm.models import MemLMCache
from tests.memory.law_tools import build_model

LAYERS = [{"mixer": {"type": "sliding_attention", "window": 5, "num_heads": 2}, "ffn": "swiglu"}]
CACHE = {"type": "neural_cache", "capacity": 9, "weight": 0.4}


@pytest.fixture(scope="module")
def model():
    return build_model(LAYERS, output=CACHE)


@pytest.fixture(scope="module")
def base():
    return build_model(LAYERS)


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def config(output):
    return MemLMConfig.from_mapping({"hidden_size": 32, "layers": LAYERS, "output": output})


BAD = [
    ("neural_cach", "output: unknown output memory 'neural_cach'; did you mean 'neural_cache'?"),
    ("knn_cache", "output: unknown output memory 'knn_cache'; did you mean"),
    ({"capacity": 3}, "output: expected a name or a mapping with `type: NAME`"),
    ({"type": "neural_cache", "capacty": 3}, "unknown key 'capacty'; did you mean 'capacity'?"),
    ({"type": "neural_cache", "capacity": "all"}, "output: Field 'capacity' expected int"),
    ({"type": "neural_cache", "capacity": 0}, "output: capacity is 0, it must be at least 1"),
    ({"type": "neural_cache", "capacity": 4, "top_k": 5}, "top_k is 5, it must be at least 1 and"),
    ({"type": "neural_cache", "metric": "l2"}, "metric"),
    ({"type": "neural_cache", "weight": 1}, "output: weight is 1.0, it must be at least 0 and"),
    ({"type": "neural_cache", "weight": -0.1}, "weight is -0.1"),
    ({"type": "neural_cache", "temperature": 0}, "temperature is 0.0, it must be positive"),
    ("knn_lm", "output: store is missing"),
    ({"type": "knn_lm", "store": "x", "engine": "hnsw"}, "did you mean 'faiss_hnsw'?"),
    ({"type": "knn_lm", "store": "x", "top_k": 0}, "top_k is 0, it must be at least 1"),
]


@pytest.mark.parametrize(("output", "message"), BAD)
def test_bad_values(output, message):
    with pytest.raises(UserError) as error:
        config(output)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_enough():
    assert config("neural_cache").output_plan()[1].capacity == 2000
    assert config(None).output_plan() is None
    built = MemLMForCausalLM(config("neural_cache"))
    assert built.output_memory.config.capacity == 2000


def test_saved_with_the_config_and_without_weights(model, base, tmp_path):
    assert model.state_dict().keys() == base.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.output == CACHE
    assert loaded.output_memory.config == model.output_memory.config
    # Any model takes one when it is loaded.
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output=CACHE)
    # A copy lies aligned in memory; products round by how weights lie in the mapped file.
    logits = copy.deepcopy(loaded)(tokens(2, 9)).logits
    assert torch.equal(logits, model(tokens(2, 9)).logits)


def test_set_and_taken_away(model, base):
    ids = tokens(2, 12)
    changed = copy.deepcopy(base)
    changed.set_output_memory(CACHE)
    assert changed.config.output == CACHE and base.config.output is None
    assert torch.equal(changed(ids).logits, model(ids).logits)
    changed.set_output_memory(None)
    assert torch.equal(changed(ids).logits, base(ids).logits)
    with pytest.raises(UserError, match="did you mean 'neural_cache'"):
        changed.set_output_memory("neural_cach")
    assert changed.config.output is None


def test_named_among_the_memories(model, base):
    assert model.memory_state_names() == ["output"]
    assert list(model.memories()) == ["output"]
    assert list(model.init_states(2)) == ["position", "0.mixer", "output"]
    assert "output" not in model.model.init_states(2)
    assert base.memory_state_names() == []
    extra = model.flops(16) - base.flops(16)
    assert extra == model.output_memory.flops(16) == 2 * 16 * 9 * 32


def test_logits_are_log_probabilities(model, base):
    ids = tokens(2, 12)
    logits, expected = model(ids).logits, base(ids).logits
    # The first token has nothing to look back on.
    assert torch.equal(logits[:, 0], expected[:, 0])
    sums = logits[:, 1:].logsumexp(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    floor = expected[:, 1:].log_softmax(-1) + math.log(0.6)
    assert (logits[:, 1:] >= floor - 1e-12).all()


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([2, 7, 8])])
def test_logits_to_keep(model, keep):
    ids = tokens(2, 12)
    whole = model(ids, return_memory_states=True)
    part = model(ids, return_memory_states=True, logits_to_keep=keep)
    expected = whole.logits[:, -keep:] if isinstance(keep, int) else whole.logits[:, keep]
    torch.testing.assert_close(part.logits, expected)
    # All of the call is written, whatever is kept.
    for name, tensor in whole.memory_states["output"].tensors().items():
        assert torch.equal(part.memory_states["output"].tensors()[name], tensor)


def test_weight_zero_gives_the_given_objects(model):
    memory = copy.deepcopy(model.output_memory)
    memory.config.weight = 0.0
    logits, state = torch.randn(2, 3, 40), memory.init_state(2)
    mixed, after = memory(torch.randn(2, 3, 32), logits, state, None)
    assert mixed is logits and after is state


def test_what_is_read_without_the_memory_leaves_no_wrong_pair(model):
    ids = tokens(1, 12)
    states = model(ids[:, :4], return_memory_states=True).memory_states
    states = model(ids[:, 4:8], memory_states=states, use_memory=False).memory_states
    cache = model(ids[:, 8:], memory_states=states).memory_states["output"]
    assert cache.positions[0, :6].tolist() == [0, 1, 2, 8, 9, 10]
    assert cache.written.tolist() == [6]
    assert cache.values[0][0, :6].tolist() == ids[0, [1, 2, 3, 9, 10, 11]].tolist()


def test_embeddings_alone_cannot_be_stored(model):
    embedded = model.get_input_embeddings()(tokens(1, 5))
    with pytest.raises(UserError, match="pass input_ids instead of inputs_embeds"):
        model(inputs_embeds=embedded)
    states = model(tokens(1, 7), return_memory_states=True).memory_states
    frozen = model(inputs_embeds=embedded, memory_states=states, write_memory=False)
    read = model(tokens(1, 5), memory_states=states, write_memory=False)
    torch.testing.assert_close(frozen.logits, read.logits)


def test_training_on_the_mixed_distribution(model):
    ids = tokens(2, 12)
    trained = copy.deepcopy(model).train()
    out = trained(ids, labels=ids)
    log_p = trained(ids).logits[:, :-1].gather(-1, ids[:, 1:, None])
    log_z = trained(ids).logits[:, :-1].logsumexp(-1)
    torch.testing.assert_close(
        out.loss, (log_z - log_p.squeeze(-1)).mean().to(out.loss.dtype), rtol=1e-6, atol=1e-6
    )
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in trained.parameters())


def test_cache_holds_the_state(model):
    cache = MemLMCache()
    model(tokens(2, 5), past_key_values=cache)
    assert cache.states["output"].written.tolist() == [4, 4]
    fresh = cache.nbytes
    model(tokens(2, 5), past_key_values=cache)
    assert cache.states["output"].written.tolist() == [9, 9]
    assert cache.nbytes >= fresh


def test_interpolation_by_hand():
    logits = torch.tensor([[[0.0, math.log(3), -math.inf], [5.0, 6.0, 7.0]]])
    scores = torch.tensor([[[0.0, 2 * math.log(2), 0.0], [-math.inf] * 3]])
    evidence = Evidence(scores, torch.tensor([[[2, 0, 2], [9, 9, 9]]]))
    # shares 1/4, 1/2, 1/4 at temperature 2; p = 0.8 (1/4, 3/4, 0) + 0.2 (1/2, 0, 1/2)
    mixed = interpolate(logits, evidence, OutputMemoryConfig(weight=0.2, temperature=2.0))
    torch.testing.assert_close(mixed[0, 0].exp(), torch.tensor([0.3, 0.6, 0.1]))
    assert torch.equal(mixed[0, 1], logits[0, 1])


def test_interpolation_of_far_tails_and_half_precision():
    evidence = Evidence(torch.tensor([[[0.0]]]), torch.tensor([[[1]]]))
    options = OutputMemoryConfig(weight=0.5)
    logits = torch.tensor([[[0.0, -300.0, -400.0]]], requires_grad=True)
    mixed = interpolate(logits, evidence, options)
    expected = torch.tensor([math.log(0.5), math.log(0.5), -400 + math.log(0.5)])
    torch.testing.assert_close(mixed[0, 0], expected)
    mixed.sum().backward()
    assert logits.grad.isfinite().all()
    half = interpolate(logits.detach().bfloat16(), evidence, options)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[0, 0].float(), expected, rtol=1e-2, atol=1e-2)
