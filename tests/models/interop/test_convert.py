"""python -m memlm.models.convert: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data import load_tokenizer
from memlm.models.convert import main
from tests.models.interop.tools import perturbed, read_tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with a Llama, its tokenizer and how it generates."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = perturbed(LlamaForCausalLM(config))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    # Published models have such: top_p without sampling, which is refused where it is set anew.
    generation = '{"eos_token_id": [2, 5], "top_p": 0.9}'
    (folder / "generation_config.json").write_text(generation)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("not a file of the tokenizer")
    return folder


def test_a_dry_run_tells_everything_and_writes_nothing(llama, tmp_path, capsys):
    target = tmp_path / "ours"
    assert main([str(llama), str(target), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    parameters = sum(tensor.numel() for tensor in read_tensors(llama).values())
    assert f"21 tensors, {parameters:,} parameters, {4 * parameters:,} bytes in 1 file" in printed
    assert "mixer: {type: attention, num_heads: 2, num_key_value_heads: 2, head_dim: 8" in printed
    assert f"dry run: nothing was written to {target}" in printed
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_and_unused_is_listed_and_ends_in_2(llama, tmp_path, capsys):
    config = json.loads((llama / "config.json").read_text())
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    (source / "model.safetensors").symlink_to(llama / "model.safetensors")
    for options in ([], ["--dry-run"]):
        assert main([str(source), str(tmp_path / "ours"), *options]) == 2
        out, err = capsys.readouterr()
        assert out.count("missing: ") == 8
        assert "missing: model.layers.1.self_attn.o_proj.bias" in out
        assert err.startswith(f"error: {source}: 8 tensors missing: ") and err.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_the_folder_holds_all_that_belongs_to_the_model(llama, tmp_path):
    target = tmp_path / "ours"
    target.mkdir()  # an empty one is taken
    assert main([str(llama), str(target)]) == 0
    assert (target / "tokenizer.json").read_text() == (llama / "tokenizer.json").read_text()
    assert not (target / "README.md").exists()
    generation = MemLMForCausalLM.from_pretrained(target).generation_config
    assert (generation.eos_token_id, generation.top_p) == ([2, 5], 0.9)
    assert MemLMConfig.from_pretrained(target).eos_token_id == 2


def test_how_a_model_generates_is_saved_as_it_was_published(llama, tmp_path):
    MemLMForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["top_p"]) == ([2, 5], 0.9)


def test_files_of_at_most_the_size_that_was_asked_for(llama, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([str(llama), str(whole)]) == 0
    assert main([str(llama), str(parts), "--max_shard_size", "4KB"]) == 0
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 5
    expected = read_tensors(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    found = MemLMForCausalLM.from_pretrained(parts).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_dtype_leaves_rates_of_decay_wide(tmp_path):
    layers = [{"mixer": {"type": "gated_delta", "num_heads": 1}, "ffn": "swiglu"}]
    config = MemLMConfig(hidden_size=16, layers=layers)
    MemLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    words = [str(tmp_path / "ours"), str(tmp_path / "fla"), "--to", "gated_deltanet"]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    dtypes = {name: tensor.dtype for name, tensor in read_tensors(tmp_path / "fla").items()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"model.layers.0.attn.A_log", "model.layers.0.attn.dt_bias"}
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tokenizer_of_bytes_goes_along(tmp_path):
    MemLMForCausalLM(MemLMConfig(hidden_size=16)).save_pretrained(tmp_path / "ours")
    load_tokenizer("bytes").save_pretrained(tmp_path / "ours")
    assert main([str(tmp_path / "ours"), str(tmp_path / "llama"), "--to", "llama"]) == 0
    assert load_tokenizer(str(tmp_path / "llama")).encode("abc") == [97, 98, 99]


def test_what_is_asked_wrongly_is_told_in_one_line(llama, tmp_path, capsys):
    ours, full = tmp_path / "ours", tmp_path / "full"
    assert main([str(llama), str(ours)]) == 0
    full.mkdir()
    (full / "note").write_text("mine")
    cases = {
        (llama, full): "is not empty",
        (llama, llama / "config.json"): "is not empty",
        (llama, tmp_path / "x", "--to", "qwen3"): "needs one of memlm",
        (ours, tmp_path / "x"): "--to says what it becomes",
        (ours, tmp_path / "x", "--to", "lama"): "did you mean 'llama'?",
        (ours, tmp_path / "x", "--to", "qwen3"): "layer 0.mixer: qk_norm False has no place",
        (llama, tmp_path / "x", "--max_shard_size", "big"): "--max_shard_size: ",
        (llama, tmp_path / "x", "--dtype", "int8"): "invalid choice: 'int8'",
        (tmp_path / "absent", tmp_path / "x"): "no folder, and not on the Hub",
    }
    for words, named in cases.items():
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "x").exists()
    assert [path.name for path in full.iterdir()] == ["note"]


def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlm.models.convert.save_file", fail)
    assert main([str(llama), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.endswith("then convert again\n")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_transformers_is_loaded_from_the_new_folder(llama, tmp_path):
    # Whatever a folder's tokenizer is, AutoTokenizer finds it beside the model of memlm.
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(source)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(source)
    assert main([str(source), str(tmp_path / "ours")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").encode("yes") == [1]
