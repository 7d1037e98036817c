from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from memlm.config import save_config
from memlm.errors import UserError
from memlm.memory import ProductKey, ProductKeyConfig
from memlm.memory.base import CallContext
from memlm.training import Trainer
from memlm.training.dead_keys import KEY_READS_FILE, DeadKeys
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.usage import UsageLog
from tests.training.launching import run_two

ROOT = Path(__file__).parents[2]
FFN = {"type": "product_key", "num_keys": 40, "num_heads": 2, "top_k": 1}
LAYER = {"mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2}, "ffn": FFN}
ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_main_process=True)


class Run:
    """A memory that has learned for some steps; its optimizer, and the watch over its keys."""

    def __init__(self, every=2, accelerator=ALONE, steps=2, seed=0):
        torch.manual_seed(0)
        self.memory = ProductKey(ProductKeyConfig(num_keys=20, num_heads=2, top_k=2), 16)
        self.optimizer = torch.optim.AdamW(self.memory.parameters(), lr=1e-2)
        self.usage = UsageLog(self.memory, accelerator, half_keys=True)
        self.dead = DeadKeys(self.usage, [self.optimizer], every, seed)
        self.read = torch.zeros(2, 2, 20, dtype=torch.bool)
        self.lines = []
        for step in range(1, steps + 1):
            self.step()
            for moment in self.moments_of().values():
                moment += 1e-3  # as if every key had been read before the window
            self.before = self.memory.keys.detach().clone()
            self.moments = self.moments_of(copy=True)
            self.lines.append(self.dead.after_step(step))

    def step(self):
        x = torch.randn(1, 3, 16)
        with self.usage.watch():
            out = self.memory(x, None, CallContext.plain(1, 3))[0]
        out.square().sum().backward()
        # What was read, from the scores of all slots.
        query = self.memory.query_norm(self.memory.query_proj(x[0]).view(3, 2, 2, 4))
        for head in range(2):
            first, second = (query[:, head, p] @ self.memory.keys[head, p].T for p in (0, 1))
            slots = (first[:, :, None] + second[:, None, :]).flatten(1).topk(2).indices
            self.read[head, 0, (slots // 20).flatten()] = True
            self.read[head, 1, (slots % 20).flatten()] = True
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments_of(self, copy=False):
        state = self.optimizer.state[self.memory.keys]
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        return {name: tensor.clone() for name, tensor in moments.items()} if copy else moments


def test_keys_that_were_read_keep_every_bit():
    run = Run()
    keys, read = run.memory.keys.detach(), run.read
    dead = int((~read).sum())
    assert 0 < dead < 80
    assert torch.equal(keys[read], run.before[read])
    assert not (keys[~read] == run.before[~read]).any()
    assert keys[~read].abs().max() <= run.memory.key_bound
    assert keys[~read].std() == pytest.approx(run.memory.key_bound / 3**0.5, rel=0.2)
    for name, moment in run.moments_of().items():
        assert torch.equal(moment[read], run.moments[name][read]), name
        assert run.moments[name][~read].all(), name
        assert not moment[~read].any() and moment[read].any(), name
    assert run.lines[0] == []
    assert run.lines[1] == [
        f"step 2: : {dead} of 80 half keys were not read in 2 steps and are drawn anew"
    ]


def test_draws_depend_on_the_seed_and_the_step():
    one, same, other = Run(), Run(), Run(seed=1)
    assert torch.equal(one.memory.keys, same.memory.keys)
    assert not torch.equal(one.memory.keys, other.memory.keys)
    # A new window: it counts from nothing, and is drawn from other numbers.
    longer = Run(steps=4)
    drawn = ~longer.read
    assert longer.lines[3] != longer.lines[1] != []
    assert not (longer.memory.keys[drawn] == one.memory.keys[drawn]).any()


def test_what_any_process_read_is_alive():
    everything = torch.ones(2, 2, 20, dtype=torch.int64)
    others = SimpleNamespace(
        num_processes=2,
        device=torch.device("cpu"),
        is_main_process=True,
        reduce=lambda values, how: values + everything,
    )
    run = Run(accelerator=others)
    assert torch.equal(run.memory.keys, run.before) and run.lines == [[], []]


def test_the_last_step_draws_nothing():
    run = Run(every=3)
    run.step()
    before = run.memory.keys.detach().clone()
    assert run.dead.after_step(3, last=True) == []
    assert torch.equal(run.memory.keys, before)


def test_a_window_begun_at_a_resumed_step_has_to_be_whole(tmp_path):
    run = Run(every=3, steps=0)
    run.dead.load(tmp_path, 2)  # there is no file
    for step in (3, 4, 5):
        run.step()
        assert run.dead.after_step(step) == []
    run.step()
    assert "not read in 3 steps" in run.dead.after_step(6)[0]


def test_a_model_without_product_keys_is_refused(make_config):
    with pytest.raises(UserError, match="reinit_keys_after: the model has no product_key memory"):
        Trainer(make_config(reinit_keys_after=2))
    with pytest.raises(UserError, match="reinit_keys_after: must be at least 1"):
        make_config(reinit_keys_after=0)


def test_a_run_draws_keys_anew_and_resumes_inside_a_window(make_config, capsys):
    options = {"model": {"layers": [LAYER]}, "reinit_keys_after": 4, "steps": 9}
    whole = make_config("whole", save_every=6, **options)
    Trainer(whole).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "drawn anew" in line]
    assert [line[:21] for line in lines] == ["step 4: layers.0.ffn:", "step 8: layers.0.ffn:"]

    resumed = make_config("resumed", **options)
    resumed.output_dir.mkdir()
    checkpoint = whole.output_dir / "checkpoints" / "step_000006"
    assert load_file(checkpoint / KEY_READS_FILE)["layers.0.ffn"].sum() == 2 * 256 * 2 * 2
    Trainer(resumed, resume=checkpoint).run()
    assert lines[1] in capsys.readouterr().out
    first, second = (load_file(c.output_dir / "model.safetensors") for c in (whole, resumed))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "tests/training/sharded_worker.py"])
def test_two_processes_draw_the_same_keys_as_one(script, make_config, tmp_path, capsys):
    options = {"model": {"layers": [LAYER]}, "reinit_keys_after": 4, "evaluation_rows": 2}
    one, two = (make_config(name, steps=9, **options) for name in ("one", "two"))
    Trainer(one).run()
    expected = [line for line in capsys.readouterr().out.splitlines() if "drawn anew" in line]
    save_config(two, tmp_path / "two.yaml")
    arguments = [str(tmp_path / "two.yaml")]
    if script == "train.py":
        arguments.insert(0, "--config")
    printed = run_two(ROOT / script, *arguments)
    assert [line for line in printed.splitlines() if "drawn anew" in line] == expected
    records = [read_metrics(c.output_dir / METRICS_FILE) for c in (one, two)]
    for single, shared in zip(*records, strict=True):
        assert single.keys() == shared.keys()
        for key, value in single.items():
            if key.startswith("layers.") or key == "loss":
                assert shared[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
