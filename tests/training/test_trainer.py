import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm.config import Stage, load_config
from memlm.errors import UserError
from memlm.training import Trainer
from memlm.training.checkpoint import complete_checkpoints
from memlm.training.logs import METRICS_FILE, read_metrics

PASSKEY = {"type": "passkey", "digits": [2, 2], "queries": [1, 1]}


def losses(config):
    records = read_metrics(config.output_dir / METRICS_FILE)
    return [record["loss"] for record in records if not record.get("evaluation")]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def passkeys(corpus):
    return {"sources": [PASSKEY | {"files": [str(corpus)]}]}


def test_loss_falls_and_the_run_folder_loads_as_a_model(make_config):
    config = make_config(steps=40, evaluation_rows=8, evaluate_every=20)
    trainer = Trainer(config)
    summary = trainer.run()
    assert summary.after["bits_per_byte"] < summary.before["bits_per_byte"] - 1
    assert 7.5 < summary.before["bits"] < 8.5
    assert summary.steps == 40
    records = read_metrics(config.output_dir / METRICS_FILE)
    assert [r["step"] for r in records if r.get("evaluation")] == [0, 20, 40]
    assert load_config(config.output_dir / "config.yaml").train == config.train

    loaded = AutoModelForCausalLM.from_pretrained(config.output_dir)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir)
    assert tokenizer.decode(tokenizer("a\nb")["input_ids"]) == "a\nb"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_repeats_losses_and_weights_exactly(make_config, corpus, optimizer):
    # Step 5 ends stage 1, whose lengths and digits differ, and the checkpoint is taken at step 4.
    stages = [
        Stage(length=64, window=8, digits=(1, 1), until=0.5),
        Stage(length=128, until=1.0),
    ]
    options = {
        "steps": 10,
        "optimizer": optimizer,
        "curriculum": stages,
        "loss_weights": {"text": 1.0, "answer": 1.0},
        "save_every": 2,
        "keep_checkpoints": 5,
    }
    whole = make_config("whole", data=passkeys(corpus), **options)
    first = Trainer(whole)
    first.run()
    for step in (4, 6):
        again = make_config(f"again{step}", data=passkeys(corpus), **options)
        again.output_dir.mkdir()
        second = Trainer(again, resume=whole.output_dir / "checkpoints" / f"step_{step:06d}")
        second.run()
        assert losses(again) == losses(whole)[step:]
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_resume_takes_the_latest_complete_checkpoint_and_cuts_the_metrics(make_config):
    config = make_config(steps=6, save_every=2)
    Trainer(config).run()
    expected = losses(config)
    latest = config.output_dir / "checkpoints" / "step_000006"
    (latest / "state.json").unlink()
    trainer = Trainer(config, resume=True)
    assert trainer.step == 4
    trainer.run()
    assert losses(config) == expected


def test_finished_run_can_be_prolonged(make_config):
    config = make_config(steps=4)
    Trainer(config).run()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    summary = Trainer(longer, resume=True).run()
    assert summary.steps == 6
    assert len(losses(config)) == 6


@pytest.mark.parametrize("loss_weights", [None, {"text": 1.0, "answer": 0.5}])
def test_micro_batches_do_not_change_the_step(make_config, corpus, loss_weights):
    # Rows hold unequal numbers of targets, so a mean of means would differ.
    options = {"steps": 3, "loss_weights": loss_weights}
    whole = make_config("whole", data=passkeys(corpus), **options)
    parts = make_config("parts", data=passkeys(corpus), micro_batch_rows=3, **options)
    trainers = [Trainer(whole), Trainer(parts)]
    assert [len(trainer.lanes.slices) for trainer in trainers] == [1, 2]
    for trainer in trainers:
        trainer.run()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in trainers[0].model.state_dict().items():
        assert torch.allclose(tensor, trainers[1].model.state_dict()[name], atol=1e-4), name


def test_what_blocks_keep_does_not_change_the_step(make_config):
    options = {"activations": "recompute_offload", "blockwise_tokens": 10}
    plain, saving = make_config("plain"), make_config("saving", **options)
    for config in (plain, saving):
        Trainer(config).run()
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-5)


def test_carried_states_reach_the_next_row_and_resume(make_config):
    options = {"steps": 6, "carry_state": True, "save_every": 3, "micro_batch_rows": 2}
    carried, cold = make_config("carried", **options), make_config("cold", **options)
    Trainer(carried).run()
    trainer = Trainer(cold)
    trainer.lanes.states = DropStates([None] * 2)
    trainer.run()
    # The first row has nothing before it; from the second on the states matter.
    assert losses(cold)[0] == losses(carried)[0]
    assert losses(cold)[1] != losses(carried)[1]

    for rows in (2, 1, 4):
        again = make_config(f"again{rows}", **(options | {"micro_batch_rows": rows}))
        again.output_dir.mkdir()
        source = carried.output_dir / "checkpoints" / "step_000003"
        Trainer(again, resume=source).run()
        tolerance = 0 if rows == 2 else 1e-5
        assert losses(again) == pytest.approx(losses(carried)[3:], abs=tolerance)
    wider = make_config("wider", **options, tokens_per_step=512)
    with pytest.raises(UserError, match="memory states of fewer rows than a step has"):
        Trainer(wider, resume=source)


class DropStates(list):
    """Forgets what is put in."""

    def __setitem__(self, index, value):
        pass


def test_a_run_ends_when_the_answers_of_its_last_stage_are_solved(make_config, corpus):
    # Any loss is below 100 bits: only the first stage, and too few steps, keep the run from ending.
    options = {
        "steps": 40,
        "curriculum": [Stage(length=64, until=0.25), Stage(length=128)],
        "stop_answer_bits": 100.0,
        "log_every": 50,
        "save_every": 16,
        "evaluation_rows": 4,
    }
    config = make_config(data=passkeys(corpus), **options)
    first = Trainer(config)
    summary = first.run()
    assert summary.steps == 18
    kept = complete_checkpoints(config.output_dir)
    assert [path.name for path in kept] == ["step_000016", "step_000018"]
    records = read_metrics(config.output_dir / METRICS_FILE)
    assert [(r["step"], r.get("evaluation", False)) for r in records] == [
        *[(0, True), (1, False), (18, False), (18, True)]
    ]
    assert records[2]["seconds_left"] == 0

    # Half-way it stops at the same step, with the same weights; at the end nothing is left to do.
    for source, left in zip(kept, ([(18, False), (18, True)], [(18, True)]), strict=True):
        again = make_config(f"from {source.name}", data=passkeys(corpus), **options)
        second = Trainer(again, resume=source)
        assert second.run().steps == 18
        found = read_metrics(again.output_dir / METRICS_FILE)
        assert [(r["step"], r.get("evaluation", False)) for r in found] == left
        assert found[-1] == records[-1]
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_curriculum_leaves_a_stage_when_the_answers_are_solved(make_config, corpus):
    stages = [
        Stage(length=64, digits=(1, 1), until=0.9, until_answer_bits=100.0),
        Stage(length=128),
    ]
    config = make_config(data=passkeys(corpus), steps=10, curriculum=stages)
    trainer = Trainer(config)
    trainer.run()
    lengths = [r["length"] for r in read_metrics(config.output_dir / METRICS_FILE)]
    # Any loss is below 100 bits, so the stage lasts as long as the average needs.
    assert lengths == [64] * 8 + [128] * 2


def test_attention_window_follows_the_stage(make_config):
    config = make_config(curriculum=[Stage(32, window=4, until=0.5), Stage(64)], steps=2)
    trainer = Trainer(config)
    assert {m.window for m in trainer.model.modules() if hasattr(m, "configured_window")} == {4}
    trainer.run()
    assert {m.window for m in trainer.model.modules() if hasattr(m, "configured_window")} == {16}


def test_only_the_latest_checkpoints_stay(make_config):
    config = make_config(steps=5, save_every=1, keep_checkpoints=2)
    Trainer(config).run()
    found = [path.name for path in complete_checkpoints(config.output_dir)]
    assert found == ["step_000004", "step_000005"]
    assert not [path for path in (config.output_dir / "checkpoints").iterdir() if "." in path.name]


def test_run_folder_in_use_is_left_alone(make_config):
    config = make_config()
    config.output_dir.mkdir()
    (config.output_dir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--resume"):
        Trainer(config)
    assert [path.name for path in config.output_dir.iterdir()] == ["notes.txt"]


def test_nothing_to_resume(make_config):
    config = make_config()
    with pytest.raises(UserError, match="no complete checkpoint"):
        Trainer(config, resume=True)
    assert not config.output_dir.exists()


def test_checkpoint_of_another_architecture(make_config):
    config = make_config(steps=1)
    Trainer(config).run()
    before = (config.output_dir / "config.yaml").read_text()
    other = make_config(model={"hidden_size": 32})
    with pytest.raises(UserError, match="hidden_size is 16 there and 32 in the config"):
        Trainer(other, resume=True)
    assert (config.output_dir / "config.yaml").read_text() == before


def test_checkpoint_of_another_optimizer(make_config):
    config = make_config(steps=1)
    Trainer(config).run()
    with pytest.raises(UserError, match="another optimizer"):
        Trainer(make_config(optimizer="muon"), resume=True)


def test_vocabulary_smaller_than_the_tokenizer(make_config):
    with pytest.raises(UserError, match="vocab_size: 100 is smaller"):
        Trainer(make_config(model={"vocab_size": 100}))


def test_carrying_data_without_states(make_config):
    with pytest.raises(UserError, match="carry_state"):
        Trainer(make_config(data={"carry": True}))


def test_diverging_loss_stops_the_run(make_config):
    trainer = Trainer(make_config(max_skipped_steps=0))
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"step 1: the loss is nan.*learning_rate"):
        trainer.run()


def test_a_diverged_memory_is_named(make_config):
    titans = {"type": "titans", "num_heads": 2, "clip": 1e-3}
    layers = [{"mixer": "attention", "memory": titans, "ffn": "swiglu"}]
    trainer = Trainer(make_config(model={"layers": layers}, steps=2))
    trainer.run()
    records = read_metrics(trainer.folder / "metrics.jsonl")
    assert [record["layers.0.memory.clipped"] for record in records] == [1.0, 1.0]

    trainer = Trainer(make_config("broken", model={"layers": layers}, max_skipped_steps=0))
    memory = trainer.model.model.layers[0].memory.module.memory
    with torch.no_grad():
        memory.initial_weights[0][0, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 1: the memory of layers.0.memory diverged.*theta_"):
        trainer.run()


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(make_config):
    plain, half = make_config("plain"), make_config("half", mixed_precision="bf16")
    Trainer(plain).run()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(half)
    trainer.run()
    assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(plain), rel=0.05)
    assert losses(half) != losses(plain)


def test_tensorboard_tracker_gets_flat_settings_or_its_absence_is_an_error(make_config):
    from accelerate.utils import is_tensorboard_available

    config = make_config(trackers=["tensorboard"], steps=2)
    if is_tensorboard_available():
        Trainer(config).run()
        assert list(config.output_dir.rglob("events.out*"))
    else:
        with pytest.raises(UserError, match="'tensorboard' is not installed"):
            Trainer(config)
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        Trainer(make_config(trackers=["wandbb"]))


def test_state_file_tells_the_next_row(make_config):
    config = make_config(steps=3)
    Trainer(config).run()
    state = json.loads(
        (complete_checkpoints(config.output_dir)[-1] / "state.json").read_text(encoding="utf-8")
    )
    assert state["step"] == 3
    assert state["data_index"] == 3 * 256 // 64


def test_random_numbers_of_a_step_depend_on_seed_and_step(make_config):
    drawn = set()
    for seed in (0, 1):
        trainer = Trainer(make_config(f"seed{seed}", seed=seed))
        for step in (0, 1):
            trainer.step = step
            for _ in range(2):
                trainer._seed()
                drawn.add(torch.rand(()).item())
        trainer.feed.close()
    assert len(drawn) == 4


TABLE = [
    {
        "mixer": {"type": "attention", "num_heads": 2},
        "ffn": {"type": "product_key", "num_keys": 64, "num_heads": 2, "top_k": 4},
    }
]


@pytest.mark.parametrize("method", ["lazy_adam", "rowwise_adagrad", "adam"])
def test_every_update_of_a_table_learns_accumulates_and_resumes(make_config, method, capsys):
    options = {
        "model": {"layers": TABLE},
        "steps": 8,
        "value_optimizer": method,
        "value_learning_rate": 1e-2,
        "clip_norm": 0.5,
        "save_every": 4,
    }
    whole = make_config("whole", **options)
    trainer = Trainer(whole)
    start = weights(trainer.model)["model.layers.0.ffn.module.values.weight"]
    trainer.run()
    assert f"ffn.module.values: {method}" in capsys.readouterr().out
    final = trainer.model.state_dict()["model.layers.0.ffn.module.values.weight"]
    changed = (final != start).any(-1).float().mean()
    assert 0.02 < changed < 0.98 or method == "adam"
    parts = make_config("parts", micro_batch_rows=1, **options)
    Trainer(parts).run()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)
    again = make_config("again", **options)
    again.output_dir.mkdir()
    resumed = Trainer(again, resume=whole.output_dir / "checkpoints" / "step_000004")
    resumed.run()
    assert losses(again) == losses(whole)[4:]
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_recomputing_blocks_reads_no_row_twice(make_config):
    options = {"model": {"layers": TABLE}, "steps": 3, "value_optimizer": "lazy_adam"}
    plain, recomputed = make_config("plain", **options), make_config("recomputed", **options)
    recomputed.train.activations = "recompute"
    first, second = Trainer(plain), Trainer(recomputed)
    first.run()
    second.run()
    assert losses(plain) == losses(recomputed)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_another_update_of_a_table_does_not_resume(make_config):
    options = {"model": {"layers": TABLE}, "steps": 2, "save_every": 1}
    Trainer(make_config(value_optimizer="rowwise_adagrad", **options)).run()
    with pytest.raises(UserError, match="train.value_optimizer it was trained with"):
        Trainer(make_config(value_optimizer="lazy_adam", **options), resume=True)
