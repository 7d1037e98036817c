"""Evaluation during training: what it says, and that training never notices it."""

import contextlib
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.config import Stage, load_config, save_config
from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.training import Trainer
from memlm.training.evaluation import TrainingTasks, unchanged
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.main import main
from memlm.training.retention import checkpoint_path
from tests.training.launching import Job, train_in_two
from tests.training.test_processes import launch
from tests.training.test_trainer import losses

LAYER = {
    "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
    "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
    "ffn": "swiglu",
}
TABLE = {"type": "product_key", "num_keys": 8, "num_heads": 2, "top_k": 4, "query_norm": "batch"}
PLAIN = [{key: value for key, value in LAYER.items() if key != "memory"}]


@pytest.fixture
def during(corpus):
    """`evaluate_during` with a task of shares and one of losses, on a few short texts."""
    return {
        "tasks": ["needle", "perplexity"],
        "lengths": [100, 150],
        "trials": 6,
        "haystack": [str(corpus)],
        "needle": {"digits": 1, "depths": 2},
        "perplexity": {"files": [str(corpus / "*.txt")], "documents": 4, "length": 64},
    }


def evaluations(config):
    return [r for r in read_metrics(config.output_dir / METRICS_FILE) if r.get("evaluation")]


def scores(record):
    return {key: value for key, value in record.items() if key.count("/") == 2}


def with_dropout(config, folder):
    """A memory that carries states and adapters with dropout for a tiny Llama."""
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if not folder.exists():
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
        ByteTokenizer().save_pretrained(folder)
    memory = {"type": "knn_cache", "capacity": 64, "segment": 8, "key_size": 8, "top_k": 4}
    lora = {"r": 2, "alpha": 4, "dropout": 0.3}
    attach = {"memory": memory, "layers": [1], "window": 16, "lora": lora}
    config.model = {"pretrained": str(folder), "attach": attach}


@pytest.mark.parametrize("case", ["states and running statistics", "dropout"])
def test_training_is_the_same_with_and_without(make_config, during, tmp_path, case):
    layers = [LAYER, LAYER | {"ffn": TABLE}]
    options = {"model": {"layers": layers}, "steps": 4, "carry_state": True, "save_every": 2}
    with_it = {"evaluation_rows": 4, "evaluate_every": 2, "evaluate_during": during}
    configs = [make_config("without", **options), make_config("with", **options, **with_it)]
    for config in configs:
        if case == "dropout":
            with_dropout(config, tmp_path / "base")
        Trainer(config).run()
    without, measured = configs
    assert [record["step"] for record in evaluations(measured)] == [0, 2, 4]
    assert losses(measured) == losses(without)
    for step in (2, 4):
        for path in checkpoint_path(without.output_dir, step).glob("*.safetensors"):
            mine, theirs = (
                load_file(checkpoint_path(config.output_dir, step) / path.name)
                for config in configs
            )
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), path.name


def test_random_numbers_modes_and_statistics_are_what_they_were(make_config, during):
    trainer = Trainer(make_config(model={"layers": [LAYER | {"ffn": TABLE}]}, length=128))
    model = trainer.model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    options = dataclasses.replace(trainer.options, evaluate_during=during)
    tasks = TrainingTasks(trainer.plain_loss, trainer.tokenizer, options, trainer.accelerator)
    (statistics,) = (b for name, b in model.named_buffers() if name.endswith("running_mean"))
    before = torch.get_rng_state()
    with unchanged(model, trainer.accelerator):
        torch.rand(3)
        statistics += 1.0
        assert tasks.run()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not statistics.any()


def test_records_hold_losses_and_scores_with_the_memory_on_and_off(make_config, during, capsys):
    options = {"model": {"layers": [LAYER]}, "steps": 4, "evaluation_rows": 4}
    config = make_config(**options, evaluate_during=during)
    trainer = Trainer(config)
    summary = trainer.run()
    first, last = evaluations(config)
    assert summary.after == {name: last[name] for name in ("bits", "text_bits", "bits_per_byte")}
    assert last["bits_off"] == trainer.evaluate(use_memory=False)["bits"] != last["bits"]
    assert last["bits_difference"] == last["bits_off"] - last["bits"]
    assert {"needle/100/on", "needle/100/off", "needle/150/off"} < scores(last).keys()
    assert scores(first)["perplexity/all/on"] - 0.5 > scores(last)["perplexity/all/on"]

    # They are those of the evaluation of the finished model.
    wanted = EvaluationConfig.from_dict(trainer.options.during())
    tasks = evaluate(trainer.model, trainer.tokenizer, wanted, progress=False)["runs"][0]["tasks"]
    expected = {
        f"{name}/{setting}/{condition}": found["value"]
        for name, task in tasks.items()
        for setting, conditions in task["scores"].items()
        for condition, found in conditions.items()
    }
    assert scores(last) == pytest.approx(expected, abs=1e-6)
    printed = capsys.readouterr().out.splitlines()
    (line,) = (one for one in printed if one.startswith("held-out after step 4: "))
    assert f"memory off {last['bits_off']:.3f} ({last['bits_difference']:+.3f})" in line
    assert f"perplexity all: on {expected['perplexity/all/on']:.3f}, off" in line
    assert "needle 150: on " in line and " %, off " in line and "perplexity 1-" not in line


def test_a_model_without_memory_has_no_second_loss(make_config, during):
    config = make_config(
        model={"layers": PLAIN}, steps=1, evaluation_rows=2, evaluate_during=during
    )
    Trainer(config).run()
    assert not any(key.endswith(("off", "difference")) for key in evaluations(config)[-1])
    assert "needle/100/on" in evaluations(config)[-1]


def test_tasks_alone_are_measured_once_at_each_end(make_config, during):
    config = make_config(model={"layers": [LAYER]}, steps=2, evaluate_during=during)
    summary = Trainer(config).run()
    assert summary.before is None and summary.after is None
    records = evaluations(config)
    assert [record["step"] for record in records] == [0, 2]
    assert "bits" not in records[0] and "needle/100/on" in records[0]


def test_trackers_get_them(make_config, during, monkeypatch):
    options = {"steps": 1, "evaluation_rows": 2, "evaluate_during": during}
    trainer = Trainer(make_config(model={"layers": [LAYER]}, **options))
    seen = []
    monkeypatch.setattr("memlm.training.report.Report.track", lambda self, one: seen.append(one))
    trainer.run()
    last = seen[-1]
    assert {"step", "held_out/bits", "held_out/bits_off", "needle/100/on"} < last.keys()


def test_a_resumed_run_measures_what_a_signal_kept_it_from(make_config, during, monkeypatch):
    options = {"model": {"layers": [LAYER]}, "steps": 6, "evaluation_rows": 2, "save_every": 100}
    options |= {"evaluate_every": 3, "evaluate_during": during}
    whole, parts = make_config("whole", **options), make_config("parts", **options)
    Trainer(whole).run()

    class AfterThree:
        def agreed(self, accelerator):
            return trainer.step == 3

    trainer = Trainer(parts)
    assert trainer.run(AfterThree()).interrupted
    assert [record["step"] for record in evaluations(parts)] == [0]
    Trainer(parts, resume=True).run()
    assert evaluations(parts) == evaluations(whole)
    assert losses(parts) == losses(whole)


def test_processes_share_the_prompts_and_join_the_scores(make_config, during, monkeypatch):
    trainer = Trainer(make_config(model={"layers": [LAYER]}, length=128))
    options = dataclasses.replace(trainer.options, evaluate_during=during)
    tasks = TrainingTasks(trainer.plain_loss, trainer.tokenizer, options, trainer.accelerator)
    expected, whole = tasks.run(), tasks._share()
    gathered = []

    def gather(found):
        gathered.extend(found)
        return gathered

    monkeypatch.setattr("memlm.training.evaluation.gather_object", gather)
    parts = []
    for process in range(2):

        class Two:
            num_processes, process_index = 2, process
            autocast = contextlib.nullcontext

        tasks.accelerator = Two()
        parts.append(tasks._share())
        scores = tasks.run()
        assert (scores == pytest.approx(expected, abs=1e-6)) == (process == 1)
    assert len(parts[0]) == len(parts[1])
    trials = [
        sorted((task.name, setting.label, n) for task, setting, rows in part for n in rows)
        for part in (whole, parts[0] + parts[1])
    ]
    assert trials[0] == trials[1]

    tasks.together = True
    assert [rows for _, _, rows in tasks._share()] == [rows for _, _, rows in whole]


def require_the_same(one, two, path):
    """Train `one` here and `two` in two processes, and compare what they measure."""
    Trainer(one).run()
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = launch(words, two, path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    for mine, other in zip(evaluations(one), evaluations(two), strict=True):
        assert other == pytest.approx(mine, abs=1e-5)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(make_config, during, tmp_path):
    options = {"model": {"layers": [LAYER]}, "steps": 2, "evaluation_rows": 4}
    options |= {"evaluate_during": during, "length": 128}
    one, two = make_config("one", **options), make_config("two", **options)
    require_the_same(one, two, tmp_path / "two.yaml")


@pytest.mark.slow
def test_processes_that_hold_tables_together_read_together(make_config, during, tmp_path):
    table = TABLE | {"query_norm": "layer"}
    options = {"model": {"layers": [LAYER | {"ffn": table}]}, "steps": 2, "evaluation_rows": 4}
    options |= {"evaluate_during": during, "length": 128, "value_optimizer": "lazy_adam"}
    one = make_config("one", **options)
    two = make_config("two", memory_parallel=2, **options)
    require_the_same(one, two, tmp_path / "two.yaml")


@pytest.mark.slow
def test_processes_that_hold_all_weights_together_read_together(make_config, during):
    options = {"model": {"layers": [LAYER]}, "steps": 2, "evaluation_rows": 4}
    options |= {"evaluate_during": during, "length": 128}
    one, two = make_config("one", **options), make_config("two", **options)
    Trainer(one).run()
    train_in_two(Job(two, sharded=True))
    for mine, other in zip(evaluations(one), evaluations(two), strict=True):
        assert scores(mine)
        assert other == pytest.approx(mine, abs=1e-5)


def test_what_cannot_be_measured_is_refused_before_the_run_begins(make_config, during):
    def refused(message, **changed):
        config = make_config(
            model={"layers": [LAYER]}, length=128, evaluate_during=during | changed
        )
        with pytest.raises(UserError, match=message):
            Trainer(config)
        assert not config.output_dir.exists()

    refused("^train.evaluate_during: needle: lengths: 40 tokens are too short", lengths=[40])
    refused("^train.evaluate_during: .*no/such.txt", haystack=["no/such.txt"])
    refused("^train.evaluate_during: tasks: unknown task 'neddle'", tasks=["neddle"])
    full = LAYER | {"mixer": {"type": "attention", "num_heads": 2}}
    config = make_config(
        model={"layers": [full], "max_position_embeddings": 64}, evaluate_during=during
    )
    with pytest.raises(UserError, match="^train.evaluate_during: needle: a prompt of 150"):
        Trainer(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{trialz: 4}", "unknown key 'train.evaluate_during.trialz'; did you mean 'trials'?"),
        ("{trials: many}", "train.evaluate_during.trials: expected int, got 'many'"),
        ("{trials: 1}", "train.evaluate_during.trials: 1 is too small"),
        ("{needle: {digits: 0}}", "train.evaluate_during.needle.digits: 0 is too small"),
        ("{tasks: [neddle]}", "train.evaluate_during.tasks: unknown task 'neddle'"),
        ("{conditions: [of]}", "train.evaluate_during.conditions: unknown condition 'of'"),
        ("needle", "train.evaluate_during: expected a mapping"),
    ],
)
def test_wrong_options_end_with_one_line_that_names_the_key(
    make_config, tmp_path, capsys, given, message
):
    save_config(make_config(), tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml"), f"--train.evaluate_during={given}"]
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_defaults_are_needles_in_rows_of_the_last_stage(make_config, tmp_path):
    stages = [Stage(length=64, until=0.5), Stage(length=128)]
    save_config(make_config(curriculum=stages), tmp_path / "run.yaml")
    loaded = load_config(tmp_path / "run.yaml", ["--train.evaluate_during={}"])
    found = EvaluationConfig.from_dict(loaded.train.evaluate_during)
    expected = EvaluationConfig(
        tasks=["needle"], lengths=[128], trials=16, conditions=["on", "off"]
    )
    assert found == expected
    save_config(loaded, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").train == loaded.train
