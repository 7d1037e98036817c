"""An attached memory is saved by itself and goes back onto the model it was trained on only."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import memlm
from memlm import UserError
from memlm.fingerprint import fingerprint
from memlm.models.attached_files import is_attached
from tests.memory.law_tools import run
from tests.models.attach_tools import FAMILIES, MEMORIES, attached, base_model, trained


@pytest.fixture
def saved(tmp_path):
    """A folder with the memory of a Llama."""
    attached("llama", "knn_cache").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_memory_comes_back_bit_for_bit(family, memory, tmp_path):
    model = attached(family, memory)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "memory.safetensors",
        "memory_config.json",
    ]
    loaded = memlm.load_memory(base_model(family), tmp_path)
    ids = torch.arange(1, 21)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, base_model(family)(ids).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.attachment.config == model.attachment.config


def test_only_the_memory_is_written(saved):
    with safe_open(saved / "memory.safetensors", "pt") as file:
        names = set(file.keys())
    model = attached("llama", "knn_cache")
    assert names == {name for name in model.state_dict() if name.startswith("memory.")}


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_the_same_model_in_another_precision_is_the_same(memory, tmp_path):
    half = base_model("llama").to(torch.bfloat16)
    wide = base_model("llama")
    wide.load_state_dict(half.state_dict())
    spec = {"memory": {"type": memory, **MEMORIES[memory]}}
    saved = trained(memlm.attach_memory(wide, spec))
    saved.save_pretrained(tmp_path)
    loaded = memlm.load_memory(half, tmp_path)
    kept = {"A_log", "dt_bias", "gates_bias", "initial_weights"}
    for name, parameter in loaded.memory.named_parameters():
        dtype = torch.float32 if kept.intersection(name.split(".")) else torch.bfloat16
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, saved.memory.get_parameter(name).to(dtype))
    ids = torch.arange(1, 21)[None]
    first, states = run(loaded, ids[:, :9])
    second, _ = run(loaded, ids[:, 9:], states)
    assert first.dtype == second.dtype == torch.bfloat16
    expected = saved(ids).logits
    error = (torch.cat([first, second], 1).float() - expected).abs().max()
    assert error < 0.1 * expected.abs().max()


def test_another_model_is_refused_and_left_alone(saved):
    model = base_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match="not those that this memory was trained on"):
        memlm.load_memory(model, saved)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "memory")
    with pytest.raises(UserError, match="belongs to a llama model .*, not to a gpt2 model"):
        memlm.load_memory(base_model("gpt2"), saved)
    with pytest.raises(UserError, match='in float32 then and is in bfloat16 now.*dtype="float32"'):
        memlm.load_memory(base_model("llama").to(torch.bfloat16), saved)
    with pytest.raises(UserError, match="has a memory already"):
        memlm.load_memory(attached("llama", "knn_cache"), saved)


def test_damage_is_refused(saved):
    weights = saved / "memory.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"memory\.safetensors is damaged"):
            memlm.load_memory(base_model("llama"), saved)
    weights.unlink()
    with pytest.raises(UserError, match="weights of the memory are missing"):
        memlm.load_memory(base_model("llama"), saved)
    config = saved / "memory_config.json"
    config.write_text(config.read_text()[:-20])
    with pytest.raises(UserError, match="not valid JSON"):
        memlm.load_memory(base_model("llama"), saved)
    config.unlink()
    with pytest.raises(UserError, match="no attached memory there"):
        memlm.load_memory(base_model("llama"), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("memory.layers.0.gate"), r"missing: memory\.layers\.0\.gate"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "unexpected: more"),
        (lambda t: t.update({"memory.layers.0.gate": torch.zeros(3)}), r"\[3\] instead of \[32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, change, message):
    tensors = load_file(saved / "memory.safetensors")
    change(tensors)
    save_file(tensors, saved / "memory.safetensors")
    alter(saved, memory_weights=fingerprint(tensors))
    model = base_model("llama")
    with pytest.raises(UserError, match=message):
        memlm.load_memory(model, saved)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.requires_grad for parameter in model.parameters())


def alter(folder, **values):
    """Change values of a saved config."""
    path = folder / "memory_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "other"}, "not that of an attached memory"),
        ({"schema": 2}, "schema 2; this version of memlm reads schema 1"),
        ({"base_model": {"name": ""}}, "has no 'dtype'"),
        ({"base_model": 3}, "'base_model' in memory_config.json is no mapping"),
        ({"attach": None}, "attach: expected a mapping"),
        ({"attach": {"memory": "knn_cash"}}, "did you mean 'knn_cache'"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(saved, values, message):
    alter(saved, **values)
    with pytest.raises(UserError, match=message):
        memlm.load_memory(base_model("llama"), saved)


def test_the_model_is_found_by_its_name(tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    base = type(base_model("llama")).from_pretrained(tmp_path / "base")
    memlm.attach_memory(base, {"memory": "min_gru"}).save_pretrained(tmp_path / "memory")
    loaded = memlm.load_attached(tmp_path / "memory")
    assert type(loaded).__name__ == "LlamaForCausalLMWithMemory"
    assert loaded.name_or_path == str(tmp_path / "base")
    assert is_attached(tmp_path / "memory") and not is_attached(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base' that this memory belongs to cannot be loaded"):
        memlm.load_attached(tmp_path / "memory")


def test_a_model_without_a_name_has_to_be_given(saved):
    with pytest.raises(UserError, match="had no name; load it yourself"):
        memlm.load_attached(saved)
