"""Files that are missing, damaged, cut or pickled are told in one line; the rest converts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.models.convert import main
from memlm.models.interop.checkpoint import Checkpoint
from tests.models.interop.tools import Tensors, perturbed, read_tensors, same_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return perturbed(LlamaForCausalLM(config))


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    llama.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def sharded(llama, tmp_path) -> Path:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    return tmp_path / "sharded"


def rewrite(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def refused(folder: Path) -> str:
    """What loading says, in one line."""
    with pytest.raises(UserError) as error:
        MemLMForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tensor_that_is_missing(folder):
    tensors = read_tensors(folder)
    del tensors[DOWN]
    rewrite(folder, tensors)
    assert refused(folder) == f"{folder}: 1 tensor missing: {DOWN}"


def test_a_tensor_of_another_shape(folder):
    tensors = read_tensors(folder)
    rewrite(folder, tensors | {DOWN: tensors[DOWN][:, :20].contiguous()})
    message = refused(folder)
    assert message.startswith(f"{folder}: the weights do not fit config.json")
    assert f"{DOWN} is [16, 20] instead of [16, 24]" in message


def test_tensors_that_no_rule_knows(folder):
    extra = {f"model.layers.{layer}.mlp.router": torch.zeros(2) for layer in range(2)}
    rewrite(folder, read_tensors(folder) | extra)
    assert refused(folder).startswith(f"{folder}: 2 tensors not understood: model.layers.0.mlp.rou")


def test_what_older_files_hold_besides_is_dropped(llama, folder):
    tensors = read_tensors(folder)
    embedding = tensors["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    rewrite(folder, tensors | frequencies | {"lm_head.weight": embedding.double()})
    ids = torch.arange(12)[None]
    model = MemLMForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)

    rewrite(folder, tensors | {"lm_head.weight": embedding + 1})
    assert "lm_head.weight is model.embed_tokens.weight, but their numbers differ" in refused(
        folder
    )


def test_files_in_parts_are_read_as_one(folder, sharded, tmp_path):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for source in (folder, sharded):
        assert main([str(source), str(tmp_path / f"from_{source.name}")]) == 0
    assert same_tensors(tmp_path / "from_sharded", tmp_path / "from_theirs")


def test_a_part_that_is_missing(sharded):
    part = sorted(sharded.glob("*.safetensors"))[1]
    part.unlink()
    assert refused(sharded) == f"{sharded}: {part.name} is missing"


def test_an_index_that_names_a_tensor_elsewhere(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {"model.more.weight": index["weight_map"][DOWN]}
    (sharded / INDEX).write_text(json.dumps(index))
    message = refused(sharded)
    assert "the index says that model.more.weight is in" in message and "not there" in message

    (sharded / INDEX).write_text("{}")
    assert refused(sharded) == f"{sharded}: {INDEX} has no weight_map"


@pytest.mark.parametrize("kept", [4, 2000], ids=["no header", "half of the numbers"])
def test_a_file_that_ends_early(folder, kept):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    assert f"{folder}: {WEIGHTS} is damaged or cut off" in refused(folder)


def test_files_that_are_not_there(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    assert refused(folder) == f"{folder}: no weights there ({WEIGHTS} or {INDEX})"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: config.json is missing"):
        Checkpoint(tmp_path / "empty")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        Checkpoint(folder)
    with pytest.raises(UserError, match="someone/absent: no folder, and not on the Hub"):
        Checkpoint("someone/absent")


class Code:
    """Pickled, it would run something."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_pickles_are_read_when_allowed_and_run_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = read_tensors(folder)
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    pickled = folder / "pytorch_model.bin"
    torch.save(tensors, pickled)
    assert "its weights are pickled (pytorch_model.bin)" in refused(folder)
    assert main([str(folder), "out"]) == 2
    assert main([str(folder), "out", "--allow_pickle"]) == 0

    model = MemLMForCausalLM.from_pretrained(folder, use_safetensors=False)
    expected = read_tensors(Path("out"))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in expected.items())

    torch.save(tensors | {"more": Code()}, pickled)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged or cut off"):
        MemLMForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not Path("ran").exists()
    torch.save(tensors | {"step": 3}, pickled)
    with pytest.raises(UserError, match="'step' of pytorch_model.bin is no tensor"):
        MemLMForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_a_model_without_a_map_is_pointed_to_attach_memory(tmp_path):
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}: a gpt2 model does not become one of memlm")
    assert "llama, mistral" in message and "memlm.attach_memory" in message


def test_arguments_of_from_pretrained_hold_for_models_of_others(llama, folder):
    model, info = MemLMForCausalLM.from_pretrained(
        folder,
        dtype="bfloat16",
        device_map="cpu",
        attn_implementation="eager",
        output_loading_info=True,
        use_cache=False,
        output_hidden_states=True,
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(info.values())
    assert model.config.use_cache is False and model.config.dtype == torch.bfloat16
    assert len(model(torch.arange(3)[None]).hidden_states) == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "eager"
    assert model.name_or_path == str(folder)
    assert not model.training
    with pytest.raises(UserError, match="variant is not known for models of other libraries"):
        MemLMForCausalLM.from_pretrained(folder, variant="fp16")
    with pytest.raises(UserError, match="hidden_size follows from the config.json"):
        MemLMForCausalLM.from_pretrained(folder, hidden_size=32)
    for config in (folder, llama.config, model.config):
        with pytest.raises(UserError, match="leave config out, it is read from there"):
            MemLMForCausalLM.from_pretrained(folder, config=config)


def test_a_config_alone_is_not_converted(folder):
    with pytest.raises(UserError, match="a llama config is none of memlm"):
        MemLMConfig.from_pretrained(folder)


def test_transformers_own_class_is_what_auto_model_loads(folder):
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM
