import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memlm.config import Stage, save_config
from memlm.errors import UserError
from memlm.evaluation.loading import load_model
from memlm.training import Trainer
from memlm.training.checkpoint import find_checkpoint, read_state
from memlm.training.consolidate import main as consolidate
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.manifest import check_manifest
from memlm.training.retention import checkpoint_path
from memlm.training.setup import check_processes
from tests.training.launching import (
    ROOT,
    Job,
    dropped_out,
    in_float64,
    save_base,
    train_in,
    train_in_two,
    watched,
)

MEMORY = [
    {
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": "swiglu",
    }
]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(options, config, path, **environment):
    save_config(config, path)
    clean = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    return subprocess.run(
        [*LAUNCH, *options, str(ROOT / "train.py"), "--config", str(path)],
        timeout=300,
        capture_output=True,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )


def losses(config):
    records = read_metrics(config.output_dir / METRICS_FILE)
    return [record["loss"] for record in records if not record.get("evaluation")]


def final(config):
    """The weights that a run ended with."""
    return load_file(config.output_dir / "model.safetensors")


def assert_same_weights(one, two, **tolerance):
    one, two = final(one), final(two)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], **(tolerance or {"rtol": 0, "atol": 0}))


def whole_rows(*processes):
    """The rows of each step, from what its processes saw."""
    return [torch.cat(parts) for parts in zip(*(seen["rows"] for seen in processes), strict=True)]


def test_two_processes_equal_one_and_each_goes_on_from_the_other(make_config, corpus):
    # Processes and micro-batches have unequal numbers of text and answer targets, so means of means
    # would differ. In float64: the losses of float32 differ by the order of their sums, which
    # is about a millionth.
    passkey = {"type": "passkey", "digits": [2, 4], "queries": [1, 2]}
    sources = [source | {"files": [str(corpus)]} for source in (passkey, {"type": "text"})]
    options = {
        "model": {"layers": MEMORY},
        "data": {"sources": sources},
        "loss_weights": {"text": 1.0, "answer": 0.5},
        "curriculum": [Stage(length=64, window=8, until=0.5), Stage(length=128)],
        "carry_state": True,
        "micro_batch_rows": 1,
        "steps": 12,
        "save_every": 4,
        "keep_checkpoints": 3,
        "evaluation_rows": 4,
    }
    one, two, middle, back = (make_config(n, **options) for n in ("one", "two", "middle", "back"))
    with in_float64():
        with watched() as of_one:
            single = Trainer(one).run()
        pair = [seen for (seen,) in train_in_two(Job(two), double=True)]
        with watched() as of_middle:
            Trainer(middle, resume=checkpoint_path(two.output_dir, 4)).run()
        place = checkpoint_path(middle.output_dir, 8)
        last = [seen for (seen,) in train_in_two(Job(back, place), double=True)]

    unequal = [list(a) != list(b) for a, b in zip(*(s["targets"] for s in pair), strict=True)]
    assert sum(unequal) > 6
    expected = losses(one)
    assert len(expected) == 12
    assert losses(two) == pytest.approx(expected, abs=1e-6)
    assert losses(middle) == pytest.approx(expected[4:], abs=1e-6)
    assert losses(back) == pytest.approx(expected[8:], abs=1e-6)
    ended = read_metrics(two.output_dir / METRICS_FILE)[-1]
    assert ended["bits"] == pytest.approx(single.after["bits"], abs=1e-6)
    assert_same_weights(one, back, rtol=0, atol=1e-6)
    for mine, theirs in zip(
        *(read_metrics(c.output_dir / METRICS_FILE) for c in (one, two)), strict=True
    ):
        told = {key for key in mine if key.startswith(("source/", "layers."))}
        assert told == {key for key in theirs if key.startswith(("source/", "layers."))}
        assert told or mine.get("evaluation")
        assert {k: theirs[k] for k in told} == pytest.approx({k: mine[k] for k in told}, rel=1e-5)

    # Exactly the rows that were left, and the states of all lanes.
    rows = whole_rows(of_one)
    for seen, step in (([*pair], 0), ([of_middle], 4), ([*last], 8)):
        for mine, theirs in zip(whole_rows(*seen), rows[step:], strict=True):
            assert torch.equal(mine, theirs)
    ends = [checkpoint_path(config.output_dir, 12) for config in (one, back)]
    assert len({read_state(place).data_index for place in ends}) == 1
    states = [load_file(place / "memory_states.safetensors") for place in ends]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6)


def test_two_processes_repeat_every_bit_under_dropout(make_config, tmp_path):
    options = {"steps": 8, "carry_state": True, "micro_batch_rows": 1, "save_every": 2}
    options |= {"curriculum": [Stage(length=32, until=0.5), Stage(length=64)]}
    options |= {"keep_checkpoints": 4}
    base = save_base(tmp_path / "base")
    whole, again = (dropped_out(make_config, base, name, **options) for name in ("whole", "again"))
    found = train_in_two(Job(whole), Job(again, checkpoint_path(whole.output_dir, 2)))
    assert losses(again) == losses(whole)[2:]
    for file in ("memory", "optimizer", "memory_states"):
        ends = [
            load_file(checkpoint_path(config.output_dir, 8) / f"{file}.safetensors")
            for config in (whole, again)
        ]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), file
    # Each process drops others, in each step, and the same ones when it repeats a step.
    masks = [[torch.stack(seen["masks"]) for seen in of_process] for of_process in found]
    for first, resumed in masks:
        done = len(first) // 3  # 2 of 4 steps of four micro-batches; 4 more have two
        assert torch.equal(first[done:], resumed)
        assert len(first.unique(dim=0)) == len(first) > 20
    assert not (masks[0][0] == masks[1][0]).all(1).any()


def test_tables_updated_by_rows_in_two_processes_equal_those_of_one(make_config):
    ffn = {"type": "product_key", "num_keys": 32, "num_heads": 2, "top_k": 4}
    options = {
        "model": {"layers": [{"mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}]},
        "steps": 6,
        "value_optimizer": "lazy_adam",
        "clip_norm": 0.5,
        "save_every": 3,
    }
    one, two, again = (make_config(name, **options) for name in ("one", "two", "again"))
    Trainer(one).run()
    train_in_two(Job(two))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    Trainer(again, resume=checkpoint_path(two.output_dir, 3)).run()
    assert losses(again) == pytest.approx(losses(one)[3:], abs=1e-5)


def test_two_launched_processes(make_config, tmp_path):
    one, two = make_config("one", steps=3), make_config("two", steps=3)
    Trainer(one).run()
    done = launch(
        ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        two,
        tmp_path / "two.yaml",
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def launch_lines():
    """The lines of the README that start several processes, as words without `accelerate launch`.

    Variables that a line sets come first.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "accelerate launch" in line]
    assert len(lines) >= 3
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("words", launch_lines(), ids=" ".join)
def test_launch_lines_of_the_readme(words, tmp_path):
    start, script = words.index("accelerate"), words.index("train.py")
    few = ["--train.steps=4", f"--train.output_dir={tmp_path / 'run'}"]
    if "--preset" not in words:  # models of 340 million parameters, text from the Hub
        few += ["--preset", "tiny"]
    two = ["--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*LAUNCH, *words[start + 2 : script], *two, *words[script:], *few],
        timeout=300,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        | dict(word.split("=", 1) for word in words[:start]),
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert "trained 4 steps" in done.stdout


# --- weights and tables that no process holds whole ---


def assert_parts(checkpoint):
    """A checkpoint that both processes wrote, without a file of whole weights or moments."""
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")}
    assert {"parts/.metadata", "parts/__0_0.distcp", "parts/__1_0.distcp"} <= names
    assert not [name for name in names if name.endswith(".safetensors") and "states" not in name]
    check_manifest(checkpoint)


@pytest.mark.parametrize("by", ["columns", pytest.param("rows", marks=pytest.mark.slow)])
def test_tables_held_by_two_processes_equal_those_of_one(make_config, by):
    ffn = {"type": "product_key", "num_keys": 16, "num_heads": 2, "top_k": 4, "share": "table"}
    layer = {"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}
    options = {
        "model": {"layers": [layer]},
        "steps": 6,
        "value_optimizer": "lazy_adam" if by == "columns" else "rowwise_adagrad",
        "clip_norm": 0.5,
        "save_every": 3,
        "evaluation_rows": 4,
    }
    held = {"memory_parallel": 2, "memory_shard": by}
    one, alone = make_config("one", **options), make_config("alone", **options)
    two, again, back = (make_config(n, **held, **options) for n in ("two", "again", "back"))
    Trainer(one).run()
    middle = checkpoint_path(two.output_dir, 3)
    train_in_two(Job(two), Job(again, middle), Job(back, checkpoint_path(one.output_dir, 3)))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_parts(middle)
    # What they end with is whole, and so is what one process makes of their parts.
    assert_same_weights(two, one, rtol=0, atol=1e-4)
    Trainer(alone, resume=middle).run()
    assert losses(alone) == pytest.approx(losses(one)[3:], abs=1e-5)
    assert losses(back) == pytest.approx(losses(one)[3:], abs=1e-5)
    assert losses(again) == losses(two)[3:]
    assert_same_weights(again, two)


def optimized(name):
    """Options of a run whose table is updated by rows, and the rest by an optimizer."""
    ffn = {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4}
    odd = {"hidden_size": 20, "intermediate_size": 33}  # nothing that two can share equally
    layers = [*MEMORY, {"mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}]
    return {
        "model": odd | {"layers": layers},
        "optimizer": name,
        "value_optimizer": "rowwise_adagrad" if name == "muon" else "lazy_adam",
        "steps": 6,
        "save_every": 3,
        "carry_state": True,
        "evaluation_rows": 4,
        "spam_reset_every": 5,
        "spam_warmup_steps": 2,
    }


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "spam"))]
)
def test_sharded_weights_train_save_and_go_on_as_whole_ones(make_config, optimizer, capsys):
    options = optimized(optimizer)
    names = ("plain", "whole", "again", "from_plain", "alone")
    plain, whole, again, from_plain, alone = (make_config(name, **options) for name in names)
    Trainer(plain).run()
    middle = checkpoint_path(whole.output_dir, 3)
    train_in_two(
        Job(whole, sharded=True),
        Job(again, middle, sharded=True),
        Job(from_plain, checkpoint_path(plain.output_dir, 3), sharded=True),
    )
    near = 1e-3 if optimizer == "muon" else 1e-5  # it rounds to bf16
    assert losses(whole) == pytest.approx(losses(plain), abs=near)
    assert_parts(middle)
    AutoModelForCausalLM.from_pretrained(whole.output_dir)
    assert_same_weights(whole, plain, rtol=0, atol=1e-2 if optimizer == "muon" else 1e-3)
    assert losses(again) == losses(whole)[3:]
    assert_same_weights(again, whole)
    assert losses(from_plain) == pytest.approx(losses(plain)[3:], abs=near)
    # One process that shards nothing goes on from the parts.
    Trainer(alone, resume=middle).run()
    assert losses(alone) == pytest.approx(losses(whole)[3:], abs=near)

    # Nor are the parts a model; what the refusal tells to do makes one of them.
    with pytest.raises(UserError, match=f"model: {middle}: the weights are in parts") as refusal:
        load_model(str(middle))
    words = shlex.split(str(refusal.value).partition("python -m memlm.training.consolidate ")[2])
    new = whole.output_dir.with_name("new")
    assert words.pop() == "FOLDER"
    assert consolidate([*words, str(new)]) == 0
    found = load_model(str(new)).state_dict()
    plain_ones = load_file(checkpoint_path(plain.output_dir, 3) / "model.safetensors")
    for name, tensor in plain_ones.items():
        assert torch.allclose(tensor, found[name], atol=1e-2 if optimizer == "muon" else 1e-3)

    # A damaged part is found, and the checkpoint before it taken.
    part = checkpoint_path(whole.output_dir, 6) / "parts" / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match="parts/__1_0.distcp: damaged: its content changed"):
        find_checkpoint(part.parents[1], whole.output_dir)
    part.unlink()
    begun = part.parents[2] / ".step_000007.parts.partial"  # of a run that was killed
    begun.mkdir()
    assert Trainer(whole, resume="auto").step == 3
    assert not begun.exists()
    assert f"{part}: missing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_of_a_sharded_model_goes_on(make_config, tmp_path):
    options = {"steps": 6, "carry_state": True, "save_every": 3, "length": 32}
    base = save_base(tmp_path / "base")
    whole, again, alone = (
        dropped_out(make_config, base, name, **options) for name in ("whole", "again", "alone")
    )
    middle = checkpoint_path(whole.output_dir, 3)
    train_in_two(Job(whole, sharded=True), Job(again, middle, sharded=True))
    assert {"memory.safetensors", "parts"} <= {path.name for path in middle.iterdir()}
    assert losses(again) == losses(whole)[3:]
    ends = [load_file(config.output_dir / "memory.safetensors") for config in (whole, again)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    # One process drops others.
    Trainer(alone, resume=middle).run()
    assert losses(alone) == pytest.approx(losses(whole)[3:], abs=1e-2)


def test_parts_of_another_model_are_refused(make_config):
    layer = {"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}
    one = make_config("one", steps=1, model={"layers": [layer]})
    train_in_two(Job(one, sharded=True))
    place = checkpoint_path(one.output_dir, 1)
    other = make_config("other", steps=1, model={"layers": [layer | {"repeat": 2}]})
    with pytest.raises(UserError, match="checkpoint of another architecture"):
        Trainer(other, resume=place)
    muon = make_config("muon", steps=1, model={"layers": [layer]}, optimizer="muon")
    with pytest.raises(UserError, match="saved with another optimizer"):
        Trainer(muon, resume=place)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "memory_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_tables_stay_out_of_sharded_weights(make_config, processes, memory_parallel):
    ffn = {"type": "product_key", "num_keys": 16, "num_heads": 2, "top_k": 4}
    layer = {"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": ffn}
    options = {"model": {"layers": [layer]}, "steps": 6, "value_optimizer": "lazy_adam"}
    options["save_every"] = 3
    plain, alone = make_config("plain", **options), make_config("alone", **options)
    sharded, again = (
        make_config(name, memory_parallel=memory_parallel, **options)
        for name in ("sharded", "again")
    )
    run = Trainer(plain)
    run.run()
    middle = checkpoint_path(sharded.output_dir, 3)
    train_in(processes, Job(sharded, sharded=True), Job(again, middle, sharded=True))
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(again) == losses(sharded)[3:]
    assert_same_weights(again, sharded)
    Trainer(alone, resume=middle).run()
    assert losses(alone) == pytest.approx(losses(plain)[3:], abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(sharded.output_dir).state_dict()
    name = "model.layers.0.ffn.module.values.weight"
    expected = run.model.state_dict()[name]
    torch.testing.assert_close(loaded[name], expected, rtol=0, atol=1e-4)


@pytest.mark.slow  # test_bad_input.py shows it with the variables that this launcher sets
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(make_config, tmp_path):
    config = make_config()
    done = launch(["--cpu", "--num_processes", "2"], config, tmp_path / "run.yaml")
    assert "error: asked for several processes but only one was started" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr
    assert not config.output_dir.exists()


def test_processes_that_do_not_find_each_other_are_noticed(make_config, monkeypatch):
    # `accelerate launch --multi_gpu` without GPUs starts two runs that know nothing of each other.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes but 1 take part"):
        check_processes(1, make_config().train)


def test_rows_that_cannot_be_shared(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="4 rows of 64 tokens cannot be shared by 3 processes"):
        check_processes(3, make_config().train)
