"""Runs that start from a pretrained model, with new memories in its blocks or without."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, insert_memory
from memlm.config import RunConfig, Stage, load_config, save_config
from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.loading import load_model
from memlm.models import count
from memlm.training import Trainer
from memlm.training.logs import read_metrics
from memlm.training.main import main
from memlm.training.provenance import read_starts
from tests.training.launching import launch_sharded
from tests.training.test_processes import launch
from tests.training.test_trainer import losses

CONFIGS = Path(__file__).parents[2] / "configs"
DELTA = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
TITANS = {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 8}
KNN = {"type": "knn_cache", "capacity": 64, "segment": 8, "key_size": 8, "top_k": 4}
TABLE = {"type": "product_key", "num_keys": 8, "num_heads": 2, "top_k": 4, "share": "table"}
TOKENS = torch.arange(80).view(2, 40) % 250


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A folder with a tiny model of this library (`own`) and a tiny Llama; both read bytes."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    layers = [{"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}]
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    own = MemLMConfig(**sizes, layers=layers, max_position_embeddings=256, eos_token_id=256)
    MemLMForCausalLM(own).save_pretrained(folder / "own")
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, vocab_size=259, max_position_embeddings=256)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "llama")
    for name in ("own", "llama"):
        ByteTokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def retrofit(make_config, folders):
    """`retrofit(name, base, insert, **train)`: the run config of a pretrained base."""

    def make(name="run", base="own", insert=None, **train) -> RunConfig:
        config = make_config(name, **train)
        config.model = {"pretrained": str(folders / base)}
        config.data.tokenizer = str(folders / base)
        if insert is not None:
            config.model["insert"] = {"layers": [1], **insert}
        return config

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("base", [pytest.param("own", marks=pytest.mark.slow), "llama"])
def test_a_frozen_base_keeps_its_logits_where_the_memory_is_off(retrofit, folders, base, capsys):
    memory = {**DELTA, "parallel": True}
    config = retrofit(base=base, insert={"memory": memory, "freeze_base": True}, steps=20)
    config.train.evaluation_rows = 8
    trainer = Trainer(config)
    start = weights(trainer)
    without = trainer.evaluate(use_memory=False)
    summary = trainer.run()
    assert summary.before == without  # as new, the memory changes nothing
    assert summary.after["bits"] < summary.before["bits"] - 0.2
    trained = weights(trainer)
    moved = {name for name in start if not torch.equal(trained[name], start[name])}
    own = {name for name in start if name.startswith("model.layers.1.memory.")}
    assert moved == own and all(tensor.dtype == torch.float32 for tensor in trained.values())
    count = sum(start[name].numel() for name in own)
    assert f"({count:,} of them trained)" in capsys.readouterr().out

    # The run folder is a whole model; eval.py loads it so.
    loaded = load_model(str(summary.output_dir))
    assert loaded.config.layers[1]["memory"] == {"gate": 0.0, **memory}
    first = MemLMForCausalLM.from_pretrained(folders / base, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, use_memory=False).logits, first(TOKENS).logits)
        assert not torch.equal(loaded(TOKENS).logits, first(TOKENS).logits)
        assert torch.equal(loaded(TOKENS).logits, trainer.model.eval()(TOKENS).logits)
    (record,) = read_starts(summary.output_dir)
    assert record["base"] == {"name": str(folders / base), "revision": None}


@pytest.mark.parametrize("base", [pytest.param("own", marks=pytest.mark.slow), "llama"])
def test_a_pretrained_model_goes_on_without_new_memories(retrofit, folders, base):
    trainer = Trainer(retrofit(base=base, steps=6))
    first = MemLMForCausalLM.from_pretrained(folders / base, dtype=torch.float32)
    assert weights(trainer).keys() == dict(first.named_parameters()).keys()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, first.get_parameter(name)), name
    folder = trainer.run().output_dir
    assert load_model(str(folder)).config.layers == first.config.layers


@pytest.mark.parametrize(
    ("base", "insert", "options"),
    [
        ("own", {"memory": TITANS, "window": 16, "freeze_base": True}, {"carry_state": True}),
        ("llama", {"memory": {**KNN, "parallel": True}}, {"activations": "recompute"}),
        pytest.param(
            *("own", {"memory": TABLE, "layers": [0, 1]}, {"value_optimizer": "lazy_adam"}),
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", None, {"optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=["frozen-carried", "knn-recomputed", "table", "muon"],
)
def test_a_resumed_run_repeats_losses_and_weights_exactly(retrofit, base, insert, options):
    options = {
        "steps": 6,
        "save_every": 2,
        "curriculum": [Stage(length=32, until=0.5), Stage(64)],
    } | options
    whole = retrofit("whole", base, insert, keep_checkpoints=4, **options)
    first = Trainer(whole)
    start = weights(first)
    first.run()
    moved = {
        name for name, tensor in weights(first).items() if not torch.equal(tensor, start[name])
    }
    frozen = insert is not None and insert.get("freeze_base", False)
    assert moved == {name for name in start if not frozen or ".memory." in name}
    again = retrofit("again", base, insert, **options)
    again.output_dir.mkdir()
    second = Trainer(again, resume=whole.output_dir / "checkpoints" / "step_000004")
    flags = {name: p.requires_grad for name, p in first.model.named_parameters()}
    assert {name: p.requires_grad for name, p in second.model.named_parameters()} == flags
    second.run()
    assert losses(again) == losses(whole)[4:]
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name]), name


def test_a_checkpoint_of_another_architecture(retrofit, make_config):
    config = retrofit(insert={"memory": DELTA}, steps=1)
    Trainer(config).run()
    other = retrofit(insert={"memory": {**DELTA, "head_dim": 4}}, steps=1)
    with pytest.raises(UserError, match=r"memory.head_dim is 8 there and 4 in the config"):
        Trainer(other, resume=True)
    with pytest.raises(UserError, match=r"layers.* is .* there and None in the config"):
        Trainer(retrofit(steps=1), resume=True)
    attached = make_config("attached", steps=1)
    attached.model = {"pretrained": config.model["pretrained"], "attach": {"memory": DELTA}}
    attached.output_dir.mkdir()
    with pytest.raises(UserError, match="a whole model, but the config has the memory of"):
        Trainer(attached, resume=config.output_dir)


def test_the_tokenizer_is_the_models_own(retrofit, folders, tmp_path):
    config = retrofit(insert={"memory": DELTA})
    save_config(config, tmp_path / "run.yaml")
    text = json.dumps({"model": config.model})  # JSON is YAML
    (tmp_path / "short.yaml").write_text(text)
    assert load_config(tmp_path / "short.yaml").data.tokenizer == str(folders / "own")
    config.data.tokenizer = "bytes"  # the same by another name
    Trainer(config)
    other = tmp_path / "other"
    ByteTokenizer(bos_token="<start>").save_pretrained(other)
    config = retrofit("another", insert={"memory": DELTA})
    config.data.tokenizer = str(other)
    with pytest.raises(UserError) as error:
        Trainer(config)
    assert str(error.value) == (
        f"data.tokenizer: '{other}' is not the tokenizer of '{folders / 'own'}'; leave it out for "
        "the model's own"
    )


def test_a_model_that_cannot_be_used(retrofit, folders, tmp_path):
    config = retrofit(insert={"memory": DELTA, "layers": [2]})
    with pytest.raises(UserError, match=r"model.insert.layers: there is no layer 2; the model has"):
        Trainer(config)
    config = retrofit(insert={"memory": KNN, "window": 4})
    with pytest.raises(UserError, match=r"model.insert: layers.1: the memory's segment \(8\) is"):
        Trainer(config)
    config.model["pretrained"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"model.pretrained: .*nothing' cannot be loaded"):
        Trainer(config)
    small = tmp_path / "small"
    MemLMForCausalLM(MemLMConfig(vocab_size=200, hidden_size=16)).save_pretrained(small)
    config = retrofit()
    config.model["pretrained"] = str(small)
    config.data.tokenizer = "bytes"
    with pytest.raises(UserError, match="'bytes' has 259 tokens, but .*small' knows 200"):
        Trainer(config)


@pytest.mark.parametrize("base", ["own", "llama"])
def test_weights_that_are_not_there(retrofit, folders, tmp_path, base):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / base, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors[next(name for name in tensors if "norm" in name)]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    config = retrofit()
    config.model["pretrained"] = str(damaged)
    with pytest.raises(UserError, match="damaged' cannot be loaded .*missing"):
        Trainer(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"insert": None}, "model.insert: expected a mapping with the memory, got None"),
        ({"insert": {}}, "model.insert.memory: expected a name or a mapping"),
        ({"insrt": {}}, "model: unknown key 'insrt'; did you mean 'insert'?"),
        ({"insert": {"memory": "titan"}}, "model.insert.memory: unknown memory 'titan'; did you"),
        (
            {"insert": {"memory": "titans", "freeze": True}},
            "model.insert: unknown key 'freeze'; did you mean 'freeze_base'?",
        ),
        ({"insert": {"memory": "titans", "freeze_base": "yes"}}, "model.insert: "),
        ({"insert": {"memory": "titans"}, "attach": {"memory": "titans"}}, "model: attach leaves"),
        ({"hidden_size": 8}, "model.hidden_size: a pretrained model has its own"),
    ],
)
def test_a_wrong_model_section(tmp_path, model, message):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": {"pretrained": "base"} | model}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_insert_without_a_model(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": {"insert": {"memory": "titans"}}}))
    with pytest.raises(UserError, match="model.pretrained: expected a folder or a Hub id"):
        load_config(path)


def test_the_retrofitted_model_is_counted(retrofit, folders, tmp_path, capsys):
    save_config(retrofit(base="llama", insert={"memory": DELTA}), tmp_path / "run.yaml")
    assert count.main([str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    model = MemLMForCausalLM.from_pretrained(folders / "llama")
    before = sum(parameter.numel() for parameter in model.parameters())
    insert_memory(model, DELTA, layers=[1])
    after = sum(parameter.numel() for parameter in model.parameters())
    assert f"{after:,}" in printed and f"{after - before - 64:,}" in printed


@pytest.mark.slow
def test_the_command_line_trains_and_evaluates(retrofit, corpus, tmp_path):
    config = retrofit(insert={"memory": DELTA}, steps=2)
    save_config(config, tmp_path / "run.yaml")
    evaluation = {"tasks": ["needle"], "lengths": [128], "trials": 4, "needle": {"depths": 2}}
    evaluation["haystack"] = [str(corpus / "0.txt")]
    words = ["--config", str(tmp_path / "run.yaml"), f"--evaluate={json.dumps(evaluation)}"]
    assert main(words) == 0
    results = json.loads((config.output_dir / "evaluation" / "results.json").read_text())
    conditions = ["on", "off", "reset", "swapped", "changed", "absent"]
    assert results["runs"][0]["conditions"] == conditions


@pytest.mark.slow
def test_two_processes_equal_one(retrofit, tmp_path):
    insert = {"memory": DELTA, "window": 16, "freeze_base": True}
    options = {"steps": 6, "carry_state": True, "micro_batch_rows": 1, "evaluation_rows": 4}
    one, two = (retrofit(name, "own", insert, **options) for name in ("one", "two"))
    Trainer(one).run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_sharded_training_equals_one_process_and_resumes(retrofit, frozen):
    insert = {"memory": DELTA, "freeze_base": frozen}
    options = {"steps": 4, "evaluation_rows": 4, "save_every": 2}
    one, two = (retrofit(name, "own", insert, **options) for name in ("one", "two"))
    Trainer(one).run()
    launch_sharded(two)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    load_model(str(two.output_dir))
    again = retrofit("again", "own", insert, **options)
    again.output_dir.mkdir()
    Trainer(again, resume=two.output_dir / "checkpoints" / "step_000002").run()
    assert losses(again) == pytest.approx(losses(one)[2:], abs=1e-4)


@pytest.mark.slow
def test_the_tiny_preset_keeps_learns_and_needs_its_memories(tmp_path):
    def run(name: str, *overrides: str):
        folder = tmp_path / name
        given = [f"--train.output_dir={folder}", "--train.save_every=0", *overrides]
        return Trainer(load_config(CONFIGS / f"{name}.yaml", given, "tiny")).run()

    base = run("transformer")
    source = str(base.output_dir)
    summary = run("retrofit", f"--model.pretrained={source}", f"--data.tokenizer={source}")
    before, after = summary.before["bits"], summary.after["bits"]
    # A window of 32 tokens instead of all that there are.
    assert before == pytest.approx(base.after["bits"], abs=0.05)
    assert after < base.after["bits"] - 0.4
    records = read_metrics(summary.output_dir / "metrics.jsonl")
    first, last = (record for record in records if record.get("evaluation"))
    assert first["bits_off"] == first["bits"] == before
    assert last["bits_off"] > after + 0.1
