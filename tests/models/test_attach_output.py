"""Output memories behind pretrained models: the laws, training, stores of the base's states."""

import copy

import pytest
import torch

from memlm import UserError, attach_memory, load_memory
from memlm.fingerprint import fingerprint
from memlm.models import AttachConfig
from tests.memory import generation_laws, state_laws, training_laws
from tests.memory.law_tools import VOCABULARY
from tests.memory.test_knn_lm import write_store
from tests.memory.test_laws import check
from tests.models.attach_tools import FAMILIES, MEMORIES, base_model, trained

CACHE = {"type": "neural_cache", "capacity": 12, "weight": 0.4}
MODELS = {family: attach_memory(base_model(family), {"output": CACHE}) for family in FAMILIES}
# Beside a memory on the layers, with a window.
MODELS["both"] = trained(
    attach_memory(
        base_model("llama"),
        {
            "memory": {"type": "knn_cache", **MEMORIES["knn_cache"]},
            "layers": [1],
            "output": CACHE,
            "window": 5,
        },
    )
)


def draw_ids(*shape, seed=0):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# Where the base matters; the others concern the memory alone.
WITH_EVERY_BASE = ("chunk", "packed", "padding", "beams")
WITH_TWO_MEMORIES = ("isolation", "causal", "fork", "read-only", "bytes", "checkpointing", "cache")
LAW_CASES = [(law, case) for law in WITH_EVERY_BASE for case in MODELS]
LAW_CASES += [(law, "both") for law in WITH_TWO_MEMORIES]


@pytest.mark.parametrize(("law", "case"), LAW_CASES)
def test_law(law, case, monkeypatch):
    for module in (state_laws, training_laws, generation_laws):
        monkeypatch.setattr(module, "model_of", lambda case, dtype=None: MODELS[case])
    check(law, case, [], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_and_detached_is_the_base(family):
    ids, model = draw_ids(2, 9), base_model(family)
    expected = model(ids).logits
    names = list(model.state_dict())
    for output in (CACHE, {**CACHE, "weight": 0.0}):
        attach_memory(model, {"output": output})
        assert list(model.state_dict()) == names
        assert torch.equal(model(ids, use_memory=False).logits, expected)
        assert torch.equal(model(ids).logits, expected) == (output["weight"] == 0)
        assert list(model.memories()) == model.memory_state_names() == ["output"]
        model.detach_memory()
        assert torch.equal(model(ids).logits, expected)


def test_logits_to_keep_and_loss_of_the_mixture():
    ids, model = draw_ids(2, 12), copy.deepcopy(MODELS["both"])
    whole = model(ids, labels=ids, return_memory_states=True)
    part = model(ids, logits_to_keep=3, return_memory_states=True)
    torch.testing.assert_close(part.logits, whole.logits[:, -3:])
    for name, tensor in whole.memory_states["output"].tensors().items():
        torch.testing.assert_close(part.memory_states["output"].tensors()[name], tensor)
    expected = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(whole.loss, expected)
    whole.loss.backward()
    assert all(p.grad is not None for p in model.memory.parameters())


def test_a_store_of_the_base_serves_the_base_with_no_other_memory(tmp_path):
    model = base_model("llama")
    text = draw_ids(1, 30, seed=8)
    with torch.no_grad():
        hidden = model.base_model(text).last_hidden_state[0, :-1]
    write_store(tmp_path / "s", hidden, text[0, 1:], fingerprint(model.state_dict()))
    output = {"type": "knn_lm", "store": str(tmp_path / "s"), "top_k": 1, "weight": 0.999}
    attach_memory(model, {"output": output})
    said = model.generate(text[:, :6], max_new_tokens=24, do_sample=False)
    assert torch.equal(said, text)
    model.detach_memory()
    memory = {"type": "gated_delta", **MEMORIES["gated_delta"]}
    attach_memory(model, {"memory": memory, "output": output})
    with pytest.raises(UserError, match="its keys were made by other weights"):
        model(text)


BAD = [
    ({"output": "neural_cach"}, "attach.output: unknown output memory 'neural_cach'; did you mean"),
    ({"output": {**CACHE, "weight": 2}}, "attach.output: weight is 2.0"),
    ({"output": CACHE, "layers": [0]}, "attach.layers: only a memory has layers"),
    ({}, "attach.memory: expected a name"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message):
        AttachConfig.from_mapping(values)


def test_the_config_comes_back():
    config = AttachConfig.from_mapping({"output": CACHE})
    assert AttachConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize("beside", [False, True])
def test_saved_without_weights_of_its_own(beside, tmp_path):
    memory = {"memory": {"type": "gated_delta", **MEMORIES["gated_delta"]}} if beside else {}
    ids = draw_ids(2, 9)
    model = attach_memory(base_model("llama"), {**memory, "output": CACHE})
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "memory")
    loaded = load_memory(base_model("llama"), tmp_path / "memory")
    assert loaded.memory.output.config == model.memory.output.config
    assert torch.equal(loaded(ids).logits, expected)
