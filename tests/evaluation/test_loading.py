"""What may be named as a model, and what is said of everything else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    MistralConfig,
    PreTrainedModel,
)

from memlm import attach_memory
from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.loading import check_tokenizer, load_model, load_subject, make_subject
from memlm.evaluation.subject import MemorySubject
from memlm.evaluation.transformers_subject import TransformersSubject
from memlm.models import MemLMForCausalLM

SIZES = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def config(kind: str = "llama", **changes):
    return AutoConfig.for_model(kind, **SIZES | changes)


def llama(**changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**changes)).eval()


@pytest.fixture(scope="module")
def _saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    llama().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_saved, tmp_path) -> Path:
    """A saved Llama with its tokenizer."""
    shutil.copytree(_saved, tmp_path / "llama")
    return tmp_path / "llama"


def change(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(source) -> str:
    """The one line that is said."""
    with pytest.raises(UserError) as stop:
        load_model(str(source))
    message = str(stop.value)
    assert message.startswith("model: ") and "\n" not in message
    return message


def test_a_model_of_transformers(folder):
    subject = load_subject(str(folder), None, EvaluationConfig(segment=9), "cpu")
    assert isinstance(subject, TransformersSubject) and not subject.model.training
    assert (subject.name, subject.source, subject.segment) == ("llama", str(folder), 9)
    for name, weight in llama().state_dict().items():
        assert torch.equal(subject.model.state_dict()[name], weight)
    with torch.inference_mode():
        states = subject.read(torch.arange(12)[None], None, None, True)
    assert subject.state_bytes(states).key_values == 2 * 2 * 12 * 16 * 4


def test_a_model_of_this_library(gated_delta, tmp_path):
    gated_delta.save_pretrained(tmp_path)
    wanted = EvaluationConfig(conditions=["on", "off"])
    subject = load_subject(str(tmp_path), "bytes", wanted, "cpu", "mine")
    assert isinstance(subject, MemorySubject) and isinstance(subject.model, MemLMForCausalLM)
    assert subject.name == "mine" and subject.plan.conditions == ("on", "off")


def test_an_attached_memory(tmp_path):
    base = AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=8)
    )
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
    attach_memory(model, {"memory": memory}).save_pretrained(tmp_path / "memory")
    subject = load_subject(str(tmp_path / "memory"), "bytes", EvaluationConfig(), "cpu")
    assert isinstance(subject, MemorySubject)
    assert subject.plan.memory_names == ("1.memory",)
    plain = load_subject(str(tmp_path / "base"), "bytes", EvaluationConfig(), "cpu")
    assert isinstance(plain, TransformersSubject)
    assert plain.plan.attention_reach == subject.plan.attention_reach == 2 * 7


def test_anything_with_memories_has_its_memory_tried(oracle, tokenizer):
    assert isinstance(make_subject(oracle, tokenizer, EvaluationConfig()), MemorySubject)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_saved_dtype_is_kept(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == dtype


def test_the_tokenizer_is_that_of_the_model(folder, tmp_path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer .* could not be loaded"):
        load_subject(str(folder), None, EvaluationConfig(), "cpu")
    small = llama(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    small.save_pretrained(tmp_path / "small")
    message = "tokenizer: it has 259 tokens, the model knows 200; give the one the model was"
    with pytest.raises(UserError, match=message):
        load_subject(str(tmp_path / "small"), "bytes", EvaluationConfig(), "cpu")
    with pytest.raises(UserError, match=message):
        check_tokenizer(make_subject(small, ByteTokenizer(), EvaluationConfig()))
    check_tokenizer(make_subject(small, None, EvaluationConfig()))


@pytest.mark.parametrize("source", ["no/such-model", "nothing", "a b/c", "/no/such/folder"])
def test_nothing_there(source):
    assert f"there is no folder {source!r}, and no such model" in refused(source)


def test_folders_that_hold_something_else(folder, tmp_path):
    assert "is a file; give a folder" in refused(folder / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("is no model folder (it has no config.json)")
    run = tmp_path / "run"
    shutil.copytree(folder, run / "checkpoints" / "step_000500")
    assert f"did you mean {str(run / 'checkpoints' / 'step_000500')!r}?" in refused(run)
    assert "did you mean" in refused(run / "checkpoints")
    load_model(str(run / "checkpoints" / "step_000500"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "it holds an adapter; merge it into its model" in refused(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("", "config.json is not valid JSON"),
        ("[1]", "config.json is no configuration of a model"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "llma"}', "of type 'llma', which transformers "),
        ('{"model_type": "x", "auto_map": {"AutoModelForCausalLM": "m.M"}}', "is never run"),
        ('{"model_type": "clip"}', "no causal language model (a model of type 'clip')"),
    ],
)
def test_wrong_configurations(folder, content, message):
    (folder / "config.json").write_text(content)
    assert message in refused(folder)


def test_own_code_beside_a_known_architecture_is_not_run(folder):
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    assert type(load_model(str(folder))).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("build", "kind", "saved"),
    [
        (AutoModelForMaskedLM, "bert", "BertForMaskedLM"),
        (AutoModelForSeq2SeqLM, "t5", "T5ForConditionalGeneration"),
        (AutoModelForSequenceClassification, "llama", "LlamaForSequenceClassification"),
        (AutoModel, "llama", "LlamaModel"),
    ],
)
def test_other_kinds_of_models(tmp_path, build, kind, saved):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = build.from_config(config(kind, **sizes if kind == "t5" else {}))
    model.save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert f"holds no causal language model ({saved}); valid: " in message


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "the weights of" in refused(folder) and "cannot be loaded (" in refused(folder)
    weights.unlink()
    assert "cannot be loaded (" in refused(folder)
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    assert "are pickles (.bin), which can run code" in refused(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, "missing keys: model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected keys: model.layers.1."),
        ({"hidden_size": 32}, "(sizes: lm_head.weight is [259, 16] instead of [259, 32], "),
        ({"hidden_act": "no_such"}, "cannot be loaded (unknown: 'no_such')"),
        ({"num_attention_heads": "two"}, "expected int, got str (value: 'two')"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded ("),
    ],
)
def test_weights_of_another_configuration(folder, values, message):
    change(folder, **values)
    assert message in refused(folder)
