"""Memories of pretrained models: trained alone, resumed exactly, saved without the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.config import RunConfig, Stage, load_config, save_config
from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.loading import load_model
from memlm.models.lora import is_lora_name
from memlm.training import Trainer
from memlm.training.main import main
from tests.training.launching import launch_sharded
from tests.training.test_processes import launch
from tests.training.test_trainer import losses

KNN = {"type": "knn_cache", "capacity": 64, "segment": 8, "key_size": 8, "top_k": 4}
TABLE = {"type": "product_key", "num_keys": 8, "num_heads": 2, "top_k": 4}
LORA = {"r": 2, "alpha": 4, "dropout": 0.2}
RUN_FILES = {"config.yaml", "memory.safetensors", "memory_config.json", "tokenizer_config.json"}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A folder with a tiny Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def attached(make_config, base):
    """`attached(name, memory, lora, **train)`: the run config of a memory for the base."""

    def make(name="run", memory=KNN, lora=None, **train) -> RunConfig:
        config = make_config(name, **train)
        attach = {"memory": memory, "layers": [1], "window": 16}
        config.model = {"pretrained": str(base), "attach": attach}
        if lora is not None:
            attach["lora"] = lora
        return config

    return make


def own(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What is trained."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_only_the_memory_is_trained_and_saved(attached, base, capsys):
    trainer = Trainer(attached(steps=30, lora=LORA, evaluation_rows=8))
    start = own(trainer)
    assert all(name.startswith("memory.") or is_lora_name(name) for name in start)
    assert {name.split(".")[0] for name in start} == {"memory", "model"}
    without = trainer.evaluate(use_memory=False)
    summary = trainer.run()
    assert summary.before == without  # as new, the memory changes nothing
    assert summary.after["bits"] < summary.before["bits"] - 0.2
    count = sum(tensor.numel() for tensor in start.values())
    assert f"({count:,} of them trained)" in capsys.readouterr().out

    trained = own(trainer)
    for name in ("memory.layers.1.gate", "memory.layers.1.module.v_proj.weight"):
        assert not torch.equal(trained[name], start[name])
    weights = {n.replace(".base_layer.", "."): t for n, t in trainer.model.state_dict().items()}
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    folder = summary.output_dir
    assert {path.name for path in folder.iterdir()} >= RUN_FILES
    saved = load_file(folder / "memory.safetensors")
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
    checkpoint = folder / "checkpoints" / "step_000030"
    assert not list(folder.glob("model*")) + list(checkpoint.glob("model*"))

    loaded = load_model(str(folder))
    tokens = torch.randint(0, 256, (2, 40))
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model(tokens).logits)
    assert not loaded.training


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (KNN, {"lora": LORA, "carry_state": True, "micro_batch_rows": 2}),
        (KNN, {"optimizer": "muon", "activations": "recompute"}),
        (TABLE, {"value_optimizer": "lazy_adam"}),
        ({"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 8}, {"carry_state": True}),
    ],
    ids=["lora-carried", "muon-recomputed", "table", "titans-carried"],
)
def test_a_resumed_run_repeats_losses_and_weights_exactly(attached, memory, options):
    stages = [Stage(length=32, window=8, until=0.5), Stage(length=64)]
    options = {"steps": 8, "curriculum": stages, "save_every": 2, **options}
    whole = attached("whole", memory, keep_checkpoints=4, **options)
    first = Trainer(whole)
    first.run()
    for step in (2, 6):
        again = attached(f"again{step}", memory, **options)
        again.output_dir.mkdir()
        second = Trainer(again, resume=whole.output_dir / "checkpoints" / f"step_{step:06d}")
        second.run()
        assert losses(again) == losses(whole)[step:]
        for name, tensor in own(first).items():
            assert torch.equal(tensor, own(second)[name]), name


def test_recomputed_layers_change_nothing(attached):
    plain = attached("plain", lora=LORA, steps=3, carry_state=True)
    recomputed = attached("recomputed", lora=LORA, steps=3, carry_state=True)
    recomputed.train.activations = "recompute"
    trainers = [Trainer(plain), Trainer(recomputed)]
    for trainer in trainers:
        trainer.run()
    assert losses(recomputed) == losses(plain)
    states = [trainer.lanes.states[0]["1.memory"].tensors() for trainer in trainers]
    assert int(states[0]["written"].max()) > 0
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_tables_are_updated_by_rows(attached):
    config = attached(memory=TABLE, steps=4, value_optimizer="lazy_adam", value_learning_rate=1e-2)
    trainer = Trainer(config)
    (update,) = trainer.table_updates
    assert (update.name, update.method) == ("memory.layers.1.module.values", "lazy_adam")
    start = own(trainer)
    trainer.run()
    changed = own(trainer)[f"{update.name}.weight"] != start[f"{update.name}.weight"]
    assert changed.any()


def write(path: Path, base: Path, **model) -> Path:
    model = {"pretrained": str(base), "attach": {"memory": "gated_delta"}} | model
    path.write_text(json.dumps({"model": model, "data": {"seed": 1}}))  # JSON is YAML
    return path


def test_the_tokenizer_is_the_models_own(tmp_path, base):
    path = write(tmp_path / "run.yaml", base)
    config = load_config(path)
    assert config.data.tokenizer == str(base) and config.data.seed == 1
    assert load_config(path, ["--data.tokenizer=bytes"]).data.tokenizer == "bytes"
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64}, "model.hidden_size: a pretrained model has its own"),
        ({"layers": []}, "model.layers: a pretrained model has its own"),
        ({"atach": {}}, "model: unknown key 'atach'; did you mean 'attach'?"),
        ({"pretrained": None}, "model.pretrained: expected a folder or a Hub id, got None"),
        ({"pretrained": 3}, "model.pretrained: expected a folder or a Hub id, got 3"),
        ({"attach": None}, "model.attach: expected a mapping with the memory, got None"),
        ({"attach": {"memmory": {}}}, "model.attach.memory: expected a name"),
        ({"attach": {"memory": "knn_cash"}}, "model.attach.memory: unknown memory 'knn_cash'"),
        (
            {"attach": {"memory": "knn_cache", "windows": 3}},
            "model.attach: unknown key 'windows'; did you mean 'window'?",
        ),
        (
            {"attach": {"memory": "knn_cache", "lora": {"rank": 3}}},
            "model.attach.lora: unknown key 'rank'",
        ),
    ],
)
def test_a_wrong_model_section(tmp_path, base, model, message):
    path = write(tmp_path / "run.yaml", base, **model)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_attach_without_a_model(tmp_path, base):
    path = write(tmp_path / "run.yaml", base)
    with pytest.raises(UserError, match="command line: model.pretrained: expected a folder"):
        load_config(path, ["--model={attach: {memory: gated_delta}}"])


def test_a_model_that_cannot_be_used(attached, base, tmp_path):
    config = attached()
    config.model["pretrained"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"model.pretrained: .*nothing' cannot be loaded"):
        Trainer(config)
    config.model["pretrained"] = str(base)
    config.model["attach"]["layers"] = [2]
    with pytest.raises(UserError, match=r"layers: there is no layer 2; the model has 0 to 1"):
        Trainer(config)
    small = tmp_path / "small"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=200, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    ).save_pretrained(small)
    config.model["pretrained"] = str(small)
    with pytest.raises(UserError, match="'bytes' has 259 tokens, but .*small' knows 200"):
        Trainer(config)


def test_a_checkpoint_of_something_else(attached, make_config):
    config = attached("memory", steps=2)
    Trainer(config).run()
    folder = config.output_dir
    other = attached("memory", KNN | {"top_k": 2}, steps=2)
    with pytest.raises(UserError, match="memory.top_k is 4 there and 2 in the config"):
        Trainer(other, resume=True)
    adapted = attached("memory", steps=2, lora=LORA)
    with pytest.raises(UserError, match=r"lora.* is None there and .* in the config"):
        Trainer(adapted, resume=True)
    whole = make_config("whole", steps=2)
    with pytest.raises(UserError, match="the memory of a pretrained model, but .* a whole model"):
        Trainer(whole, resume=folder)
    Trainer(whole).run()
    with pytest.raises(UserError, match="a whole model, but .* the memory of a pretrained model"):
        Trainer(attached("another", steps=2), resume=whole.output_dir)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_line_trains_and_evaluates(attached, corpus, tmp_path, capsys):
    config = attached(steps=2)
    save_config(config, tmp_path / "run.yaml")
    evaluation = {"tasks": ["needle"], "lengths": [128], "trials": 4, "needle": {"depths": 2}}
    evaluation["haystack"] = [str(corpus / "0.txt")]
    words = ["--config", str(tmp_path / "run.yaml"), f"--evaluate={json.dumps(evaluation)}"]
    assert main(words) == 0
    results = json.loads((config.output_dir / "evaluation" / "results.json").read_text())
    conditions = ["on", "off", "reset", "swapped", "changed", "absent"]
    assert results["runs"][0]["conditions"] == conditions
    assert main(words) == 2
    assert "the run folder is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one(attached, tmp_path):
    options = {"lora": {"r": 2, "dropout": 0.0}, "steps": 6, "carry_state": True}
    options |= {"micro_batch_rows": 1, "save_every": 3, "evaluation_rows": 4}
    one, two = attached("one", **options), attached("two", **options)
    Trainer(one).run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    resumed = attached("resumed", **options)
    resumed.output_dir.mkdir()
    Trainer(resumed, resume=two.output_dir / "checkpoints" / "step_000003").run()
    assert losses(resumed) == pytest.approx(losses(one)[3:], abs=1e-5)


@pytest.mark.slow
def test_sharded_training_equals_one_process(attached):
    options = {"lora": {"r": 2, "dropout": 0.0}, "steps": 4, "evaluation_rows": 4}
    one, two = attached("one", **options), attached("two", **options)
    Trainer(one).run()
    launch_sharded(two)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    load_model(str(two.output_dir))
