"""Saved memory states: a conversation that goes on from a file is the one never interrupted."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memlm import MemLMCache, UserError
from memlm.models.memory_state_files import KEY, describe
from tests.memory.contract import cases
from tests.memory.law_tools import build_model, model_of
from tests.memory.test_knn_lm import add_store
from tests.models.attach_tools import MEMORIES, attached

KINDS = ("", "lru", "context", "no_conv", "depth1", "mac-depth1", "mag-depth1", "nearest")
LAYERS = [
    {
        "mixer": {"type": "sliding_attention", "window": 5, "num_heads": 2, "conv_size": 3},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": "swiglu",
    }
]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# One case of every memory and of every kind of state.
CASES = [case for case in cases() if case.site == case.spec.sites[0] and case.spec.label in KINDS]


@pytest.fixture(scope="module")
def model():
    return build_model(LAYERS)


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "memory.safetensors"
    model.save_memory_state(path, model(tokens(2, 9)).past_key_values)
    return path


def tokens(*shape, seed=3):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def assert_goes_on(model, path):
    """A file brings the middle of a conversation back, in every bit."""
    ids = tokens(2, 17)
    whole = model.generate(ids, **GREEDY)
    cache = model(ids[:, :11]).past_key_values
    model.save_memory_state(path, cache)
    loaded = model.load_memory_state(path)
    for name, state in loaded.states.items():
        assert type(state) is type(cache.states[name])
        for field, tensor in state.tensors().items():
            before = cache.states[name].tensors()[field]
            assert tensor.dtype == before.dtype and torch.equal(tensor, before)
    assert torch.equal(model.generate(ids[:, 11:], past_key_values=loaded, **GREEDY), whole[:, 11:])


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_memory_goes_on_from_a_file(case, tmp_path):
    assert_goes_on(model_of(case), tmp_path / "state")


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_attached_memories_keep_the_keys_of_their_model_as_well(memory, tmp_path):
    model = attached("llama", memory)
    assert_goes_on(model, tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        assert {key.split("/")[0] for key in file.keys()} == {  # noqa: SIM118
            "base",
            "position",
            "0.memory",
            "2.memory",
        }


@torch.no_grad()
def test_a_store_on_disk_is_named_by_what_is_in_it(tmp_path):
    plain = build_model(LAYERS)
    model = add_store(plain, tmp_path / "store", top_k=3)
    assert_goes_on(model, tmp_path / "state")
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="knn_lm.*store: there is no such store"):
        model.load_memory_state(tmp_path / "state")
    moved = {**model.config.output, "store": str(tmp_path / "moved")}
    model.set_output_memory(moved)
    assert model.load_memory_state(tmp_path / "state").columns == 0
    other = tmp_path / "other"
    add_store(build_model(LAYERS, seed=1), other)
    model.set_output_memory({**moved, "store": str(other)})
    with pytest.raises(UserError, match=r"another config: config\.output\.store is "):
        model.load_memory_state(tmp_path / "state")


def test_a_conversation_of_generate_in_three_processes(model, tmp_path):
    """What generate() returns is what is saved; its last token is still to be read."""
    path = tmp_path / "sub" / "memory.safetensors"
    prompts = [tokens(1, 6), tokens(1, 3, seed=4), tokens(1, 5, seed=5)]
    history = torch.empty(1, 0, dtype=torch.int64)
    unread, cache = history, None
    for prompt in prompts:
        new = torch.cat([unread, prompt], 1)
        out = model.generate(new, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        answer = out.sequences[:, new.shape[1] :]
        history = torch.cat([history, prompt], 1)
        assert torch.equal(model.generate(history, **GREEDY)[:, history.shape[1] :], answer)
        history, unread = torch.cat([history, answer], 1), answer[:, -1:]
        model.save_memory_state(path, out.past_key_values)
        cache = copy.deepcopy(model).load_memory_state(path)


def test_one_row_of_a_batch(model, tmp_path):
    ids = tokens(3, 9)
    states = model(ids, return_memory_states=True).memory_states
    row = {name: state.select(torch.tensor([1])) for name, state in states.items()}
    model.save_memory_state(tmp_path / "row", row)
    new = tokens(1, 4, seed=6)
    cache = model.load_memory_state(tmp_path / "row")
    several = model.generate(new, past_key_values=cache, num_beams=3, **GREEDY)
    whole = model.generate(torch.cat([ids[1:2], new], 1), num_beams=3, **GREEDY)
    assert torch.equal(several, whole[:, 9:])
    with pytest.raises(UserError, match="those of 1 rows, but the call has 2"):
        model.generate(tokens(2, 4), past_key_values=cache, **GREEDY)


def test_the_manifest_says_whose_it_is(model, saved):
    with safe_open(saved, "pt") as file:
        manifest = json.loads(file.metadata()[KEY])
    assert manifest["weights"] == model.weights_fingerprint()
    assert (manifest["batch_size"], manifest["tokens"]) == (2, [9, 9])
    assert manifest["states"]["0.memory"]["class"] == "GatedDeltaState"
    assert manifest["model"]["config"]["layers"] == LAYERS
    assert manifest["dtype"] == "float64"


def test_bfloat16_comes_back_in_bfloat16(tmp_path):
    assert_goes_on(build_model(LAYERS, torch.bfloat16), tmp_path / "state")


def test_other_models_are_refused_by_what_differs(model, saved):
    other = copy.deepcopy(LAYERS)
    other[0]["memory"]["head_dim"] = 4
    place = r"config\.layers\[0\]\.memory\.head_dim is 8 there and 4 here"
    with pytest.raises(UserError, match=f"another config: {place}"):
        build_model(other).load_memory_state(saved)
    with pytest.raises(UserError, match="of the same config with other weights"):
        build_model(LAYERS, seed=1).load_memory_state(saved)
    with pytest.raises(UserError, match="same config in float64, this one is in float32"):
        build_model(LAYERS, torch.float32).load_memory_state(saved)
    with pytest.raises(UserError, match="saved by a memlm model, this is a llama model"):
        attached("llama", "gated_delta").load_memory_state(saved)
    output = build_model(LAYERS, output={"type": "neural_cache", "capacity": 8})
    with pytest.raises(UserError, match=r"config\.output is null there and "):
        output.load_memory_state(saved)


def test_attached_memories_of_another_config_are_refused(tmp_path):
    model = attached("llama", "gated_delta")
    model.save_memory_state(tmp_path / "state", model(tokens(1, 5)).past_key_values)
    with pytest.raises(UserError, match=r"attach\.window is null there and 9 here"):
        attached("llama", "gated_delta", 9).load_memory_state(tmp_path / "state")


def test_what_does_not_change_the_answer_does_not_count(model):
    same = copy.deepcopy(model)
    same.config.use_cache, same.config.eos_token_id = False, 7
    assert describe(same) == describe(model)


def test_damaged_files_are_refused(model, saved, tmp_path):
    whole = saved.read_bytes()
    cases = {
        "no safetensors file": whole[: len(whole) // 2],
        "its tensors are not those": whole[:-8] + bytes(8 * [7]),
        "or no safetensors file": b"",
    }
    for reason, content in cases.items():
        saved.write_bytes(content)
        with pytest.raises(UserError, match=f"damaged.*{reason}"):
            model.load_memory_state(saved)
    with pytest.raises(UserError, match="no such file"):
        model.load_memory_state(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder, not a file"):
        model.load_memory_state(tmp_path)
    save_file({"a": torch.zeros(2)}, saved)
    with pytest.raises(UserError, match="but not that of a memory state"):
        model.load_memory_state(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "schema 9; this version of memlm reads schema 1"),
        ({"states": None}, "damaged .its manifest has no 'states'"),
        ({"class": "MatrixState"}, "is a MatrixState of .* keeps a GatedDeltaState there"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_manifests_of_other_versions_are_refused(model, saved, change, message):
    with safe_open(saved, "pt") as file:
        manifest = json.loads(file.metadata()[KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "class" in change:
        manifest["states"]["0.memory"] |= change
    else:
        manifest |= change
    manifest = {key: value for key, value in manifest.items() if value is not None}
    save_file(tensors, saved, {KEY: json.dumps(manifest)})
    with pytest.raises(UserError, match=message):
        model.load_memory_state(saved)


def test_states_that_cannot_be_saved_are_refused(model, tmp_path):
    for nothing in (None, {}, MemLMCache()):
        with pytest.raises(UserError, match="there is no memory state to save"):
            model.save_memory_state(tmp_path / "state", nothing)
    other = build_model([{"mixer": {"type": "min_gru"}}]).init_states(1)
    with pytest.raises(UserError, match="the states are those of another model: they are "):
        model.save_memory_state(tmp_path / "state", other)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        model.save_memory_state(tmp_path, model.init_states(1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written .*then save it again"):
        model.save_memory_state(tmp_path / "file" / "state", model.init_states(1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlm.models.memory_state_files.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        model.save_memory_state(saved, model.init_states(1))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
