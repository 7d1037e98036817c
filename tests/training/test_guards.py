import json
import math

import pytest
import torch
from safetensors.torch import load_file

from memlm.config import save_config
from memlm.errors import UserError
from memlm.training import Trainer
from memlm.training.guards import KEPT_BATCHES
from memlm.training.logs import METRICS_FILE, read_metrics
from tests.training.launching import run_two

MEMORY = [
    {
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": {"type": "product_key", "num_keys": 8, "top_k": 2, "query_norm": "batch"},
    }
]


def break_steps(trainer, steps, value=math.nan):
    """In these steps (from 1) losses, carried states and running statistics become `value`."""

    def hook(module, inputs, output):
        loss, sums, states = output
        if trainer.step + 1 not in steps:
            return None
        for buffer in trainer.model.buffers():
            buffer.fill_(value)
        for state in (states or {}).values():
            for tensor in state.tensors().values():
                if tensor.is_floating_point():
                    tensor.fill_(value)
        return loss * value, sums * value, states

    trainer.row_loss.register_forward_hook(hook)
    return trainer


def everything(trainer):
    """All that a step may change, as tensors."""
    tensors = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for optimizer in trainer.optimizers:
        for number, state in enumerate(optimizer.state.values()):
            tensors |= {f"{number}.{name}": value.clone() for name, value in state.items()}
    return tensors | trainer.lanes.gather()


def records(config):
    return [r for r in read_metrics(config.output_dir / METRICS_FILE) if not r.get("evaluation")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_changes_nothing_and_takes_the_next_rows(make_config, capsys, value):
    config = make_config(
        model={"layers": MEMORY}, carry_state=True, micro_batch_rows=2, steps=6, log_every=2
    )
    trainer = break_steps(Trainer(config), {3, 4}, value)
    seen, batches, one_step = [], [], trainer._one_step

    def watched():
        batches.append(trainer.feed.get(trainer.step))
        loss = one_step()
        seen.append(everything(trainer))
        return loss

    trainer._one_step = watched
    summary = trainer.run()
    assert summary.steps == 6 and math.isfinite(summary.loss)
    for step, changed in ((2, True), (3, False), (4, False), (5, True)):
        before, after = seen[step - 2], seen[step - 1]
        assert before.keys() == after.keys() and len(before) > 30
        equal = all(torch.equal(before[name], after[name]) for name in before)
        assert equal != changed, step
    assert all(tensor.isfinite().all() for tensor in seen[-1].values())

    lines = capsys.readouterr().out.splitlines()
    (third,) = [line for line in lines if line.startswith("step 3:")]
    assert "skipped (1 in a row, 1 in all)" in third and str(config.output_dir) in third
    assert any(line.startswith("step 4:") and "(2 in a row, 2 in all)" in line for line in lines)
    assert "  skipped 2  " in next(line for line in lines if line.startswith("step 6/6"))
    assert "skipped" not in next(line for line in lines if line.startswith("step 2/6"))
    found = {r["step"]: (r["loss"] is None, r["skipped_steps"]) for r in records(config)}
    expected = {1: (False, 0), 2: (False, 0), 3: (True, 1), 4: (True, 2), 6: (False, 2)}
    assert found == expected
    for line in (config.output_dir / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    kept = load_file(config.output_dir / "skipped" / "step_000003" / "batch.safetensors")
    assert kept.keys() == batches[2].keys()
    assert all(torch.equal(kept[name], batches[2][name]) for name in kept)
    step = json.loads((config.output_dir / "skipped" / "step_000003" / "step.json").read_text())
    assert step["step"] == 3 and not math.isfinite(float(step["loss"]))


def test_parameters_with_broken_gradients_are_named(make_config):
    options = {"value_optimizer": "lazy_adam", "max_skipped_steps": 1}
    trainer = Trainer(make_config(model={"layers": MEMORY}, **options))
    parameters = dict(trainer.model.named_parameters())
    (table,) = [name for name in parameters if name.endswith("values.weight")]
    broken = "model.layers.0.mixer.module.q_proj.weight"
    parameters[broken].register_hook(lambda gradient: gradient * math.nan)

    def in_step_two(module, inputs, output):
        # The loss stays finite: only the gradient of the table becomes infinite.
        if trainer.step == 1 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    place = trainer.model.model.layers[0].ffn.module.values
    place.register_forward_hook(in_step_two)
    message = "step 2: the loss is [0-9].* norm nan, after 1 skipped step; lower"
    with pytest.raises(UserError, match=message):
        trainer.run()
    named = []
    for step in (1, 2):
        path = trainer.folder / "skipped" / f"step_{step:06d}" / "step.json"
        named.append(json.loads(path.read_text())["parameters"])
    assert named[0] == [broken]
    assert table in named[1] and broken in named[1]


def test_too_many_in_a_row_end_the_run(make_config):
    config = make_config(steps=12, max_skipped_steps=2)
    trainer = break_steps(Trainer(config), {2, 3, 5, 6, 8, 9, 10})
    with pytest.raises(UserError) as error:
        trainer.run()
    assert str(error.value).startswith(
        "step 10: the loss is nan and the gradient norm nan, after 2 skipped steps; "
    )
    assert "\n" not in str(error.value)
    assert str(config.output_dir / "skipped" / "step_000010") in str(error.value)
    kept = sorted(path.name for path in (config.output_dir / "skipped").iterdir())
    assert kept == [f"step_{step:06d}" for step in (2, 3, 5, 6, 8, 9, 10)]


def test_zero_ends_the_run_at_once(make_config):
    trainer = break_steps(Trainer(make_config(max_skipped_steps=0)), {2})
    with pytest.raises(UserError, match="step 2: the loss is nan and the gradient norm nan; lower"):
        trainer.run()


def test_only_the_latest_batches_stay(make_config):
    config = make_config(steps=KEPT_BATCHES + 4, max_skipped_steps=100)
    trainer = break_steps(Trainer(config), range(2, KEPT_BATCHES + 4))
    mine = trainer.folder / "skipped" / "step_by_step"  # a user's notes
    mine.mkdir(parents=True)
    trainer.run()
    mine.rmdir()
    kept = sorted(path.name for path in (config.output_dir / "skipped").iterdir())
    assert len(kept) == KEPT_BATCHES and kept[-1] == f"step_{KEPT_BATCHES + 3:06d}"


def test_a_resumed_run_counts_on(make_config):
    options = {"steps": 8, "save_every": 4, "carry_state": True, "max_skipped_steps": 2}
    broken = {2, 4, 5}
    whole = make_config("whole", **options)
    break_steps(Trainer(whole), broken).run()
    again = make_config("again", **options)
    again.output_dir.mkdir()
    trainer = Trainer(again, resume=whole.output_dir / "checkpoints" / "step_000004")
    assert (trainer.guard.skipped, trainer.guard.in_a_row) == (2, 1)
    break_steps(trainer, broken).run()
    (first, second) = (
        [(r["loss"], r["skipped_steps"]) for r in records(config)] for config in (whole, again)
    )
    assert second == first[4:] and second[-1][1] == 3

    less = make_config("less", **options)
    less.output_dir.mkdir()
    trainer = Trainer(less, resume=whole.output_dir / "checkpoints" / "step_000004")
    with pytest.raises(UserError, match="step 6: .* after 2 skipped steps"):
        break_steps(trainer, {5, 6}).run()


def test_a_number_of_steps_below_zero(make_config):
    with pytest.raises(UserError, match="train.max_skipped_steps: must be at least 0, got -1"):
        make_config(max_skipped_steps=-1)


WORKER = """
import math, sys
from memlm.config import load_config
from memlm.training import Trainer

trainer = Trainer(load_config(sys.argv[1]))

def one_process_fails(module, inputs, output):
    loss, sums, states = output
    if trainer.step == 2 and trainer.accelerator.process_index == 1:
        return loss * math.nan, sums * math.nan, states

trainer.row_loss.register_forward_hook(one_process_fails)
trainer.run()
values = [float(p.double().sum()) for p in trainer.model.parameters()]
print("RESULT", trainer.guard.skipped, trainer.guard.in_a_row, values, flush=True)
"""


@pytest.mark.slow
def test_all_processes_skip_what_one_cannot_do(make_config, tmp_path):
    config = make_config("two", model={"layers": MEMORY}, carry_state=True, steps=4)
    save_config(config, tmp_path / "two.yaml")
    (tmp_path / "worker.py").write_text(WORKER)
    printed = run_two(tmp_path / "worker.py", tmp_path / "two.yaml")
    results = [line for line in printed.splitlines() if "RESULT" in line]
    assert len(results) == 2 and results[0] == results[1]
    assert "RESULT 1 0 " in results[0] and "nan" not in results[0]
    kept = load_file(config.output_dir / "skipped" / "step_000003" / "batch.safetensors")
    assert kept["input_ids"].shape == (4, 64)  # the rows of both
