"""A saved model is the same model: ties, dtypes, devices, quantization, and what loads it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    QuantoConfig,
)

from memlm import MemLMConfig, MemLMForCausalLM, MemLMModel, UserError
from memlm.models.stub import STUB_FILE
from tests.memory.contract import cases
from tests.memory.law_tools import model_of

CASES = {str(case): case for case in cases()}
# Weights that accelerate alone does not bring, a table, an output memory.
OFFLOADED = [
    "knn_cache-memory",
    "titans-mac-depth1-mixer",
    "product_key-ffn",
    "neural_cache-output",
]
PLAIN = {"hidden_size": 32, "layers": [{"repeat": 2, "mixer": "attention", "ffn": "swiglu"}]}


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def assert_same(one, other):
    """Every weight and buffer has the same name, dtype and bits."""
    first, second = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_saved_once_and_are_tied_again(tied, tmp_path):
    torch.manual_seed(0)
    model = MemLMForCausalLM(MemLMConfig(**PLAIN, tie_word_embeddings=tied))
    saved(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) is not tied
    loaded = MemLMForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_same(loaded, model)


@pytest.mark.parametrize("name", ["gated_delta-mixer", "titans-depth1-mixer"])
def test_bfloat16_keeps_its_float32_weights(name, tmp_path):
    whole = saved(model_of(CASES[name], torch.float32), tmp_path / "whole")
    half = MemLMForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    kept = set(MemLMForCausalLM._keep_in_fp32_modules_strict)
    wanted = {
        key: torch.float32 if kept.intersection(key.split(".")) else torch.bfloat16
        for key, _ in half.named_parameters()
    }
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    saved(half, tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {key: stored[key].dtype for key in wanted if key in stored} == wanted
    assert_same(MemLMForCausalLM.from_pretrained(tmp_path / "half", dtype="auto"), half)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "half"), half)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_a_device_map_of_one_device(device_map, tmp_path):
    model = model_of(CASES["gated_delta-mixer"], torch.float32)
    saved(model, tmp_path)
    assert_same(MemLMForCausalLM.from_pretrained(tmp_path, device_map=device_map), model)


@torch.no_grad()
@pytest.mark.parametrize("name", OFFLOADED)
def test_a_model_on_disk_computes_and_saves_the_same(name, tmp_path):
    saved(model_of(CASES[name], torch.float32), tmp_path / "model")
    resident = MemLMForCausalLM.from_pretrained(tmp_path / "model").eval()
    layers = {f"model.layers.{index}": "disk" for index in range(len(resident.model.layers))}
    devices = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head"], "cpu") | layers
    if resident.output_memory is not None:
        devices["output_memory"] = "disk"
    offloaded = MemLMForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert sum(parameter.is_meta for parameter in offloaded.parameters()) > 10
    ids = tokens(2, 17)
    outputs = []
    for model in (resident, offloaded):
        first = model(ids[:, :9], return_memory_states=True)
        outputs.append(model(ids[:, 9:], memory_states=first.memory_states))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for state, other in zip(*(o.memory_states.values() for o in outputs), strict=True):
        for one, two in zip(state.tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(one, two)
    saved(offloaded, tmp_path / "again")
    assert_same(MemLMForCausalLM.from_pretrained(tmp_path / "again"), resident)


def test_what_memories_share_is_not_offloaded(tmp_path):
    saved(model_of(CASES["product_key-shared-ffn"], torch.float32), tmp_path)
    devices = dict.fromkeys(["model.embed_tokens", "model.norm", "model.layers", "lm_head"], "cpu")
    devices["model.shared"] = "disk"
    with pytest.raises(UserError, match="give 'model.shared' a device in device_map"):
        MemLMForCausalLM.from_pretrained(
            tmp_path, device_map=devices, offload_folder=tmp_path / "offloaded"
        )


def test_memories_are_not_quantized(tmp_path):
    layers = [
        {"mixer": "attention", "memory": "gated_delta", "ffn": "swiglu"},
        {"mixer": "titans", "ffn": "product_key"},
    ]
    torch.manual_seed(0)
    saved(MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers)), tmp_path)
    sites = ["model.layers.0.memory.module", "model.layers.1.mixer.module"]
    sites.append("model.layers.1.ffn.module")
    # What is listed already is not named again.
    listed = QuantoConfig(weights="int8", modules_to_not_convert=["lm_head", *sites[:2]])
    with pytest.raises(UserError, match="quanto: memories cannot be quantized") as refusal:
        MemLMForCausalLM.from_pretrained(tmp_path, quantization_config=listed)
    assert str(sites[2:]) in str(refusal.value)
    with pytest.raises(UserError, match="memories cannot be quantized"):
        MemLMForCausalLM.from_pretrained(tmp_path, quantization_config={"load_in_8bit": True})
    with pytest.raises(UserError, match="llm_int8_skip_modules") as refusal:
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
    assert all(site in str(refusal.value) for site in sites)
    assert "\n" not in str(refusal.value)
    # Left out of it, the rest is for the method itself, which is not installed here.
    spared = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", *sites])
    with pytest.raises(ImportError, match="bitsandbytes"):
        MemLMForCausalLM.from_pretrained(tmp_path, quantization_config=spared)


def test_a_model_without_memories_may_be_quantized(tmp_path):
    torch.manual_seed(0)
    saved(MemLMForCausalLM(MemLMConfig(**PLAIN)), tmp_path)
    with pytest.raises(ImportError, match="bitsandbytes"):
        MemLMForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_a_saved_model_names_the_code_that_loads_it(tmp_path):
    torch.manual_seed(0)
    model = MemLMForCausalLM(MemLMConfig(**PLAIN))
    saved(model, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    namespace = {}
    exec((tmp_path / STUB_FILE).read_text(), namespace)
    for name, kind in (("AutoConfig", MemLMConfig), ("AutoModel", MemLMModel)):
        module, class_name = found[name].split(".")
        assert f"{module}.py" == STUB_FILE and namespace[class_name] is kind
    # What AutoModel calls with trust_remote_code=True must not make saving copy source files.
    for registered in (MemLMConfig, MemLMForCausalLM):
        registered.register_for_auto_class()
    (tmp_path / STUB_FILE).write_text("raise AssertionError('this code was run')")
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MemLMConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MemLMModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True), model)
    saved(loaded, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        STUB_FILE,
    ]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == found


def test_damaged_weights_are_one_line(tmp_path):
    torch.manual_seed(0)
    saved(MemLMForCausalLM(MemLMConfig(**PLAIN)), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(UserError, match="the weights are damaged") as refusal:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", ["/not/there", "../not_there", "a/b/c"])
def test_a_folder_that_is_not_there_is_one_line(source):
    with pytest.raises(UserError, match=f"there is no folder '{source}', and no such id"):
        MemLMForCausalLM.from_pretrained(source)
