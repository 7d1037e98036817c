import math
from pathlib import Path

import pytest
import torch

from memlm.config import save_config
from memlm.training import Trainer, spam
from memlm.training.logs import METRICS_FILE, read_metrics
from memlm.training.spam import Spam
from tests.training.launching import run_two

OPTIONS = {
    "lr": 1e-2,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "threshold": 50.0,
    "reset_every": 40,
    "warmup_steps": 15,
}


def reference(weight, gradients, o):
    """The algorithm of the paper, one number and one line at a time."""
    (beta1, beta2), weights = o["betas"], []
    w, m, v = weight, 0.0, 0.0
    for t, g in enumerate(gradients):
        k = t % o["reset_every"]
        if k == 0:  # momentum reset
            m, v = 0.0, 0.0
        if k >= 20 and v > 0 and g**2 / v > o["threshold"]:  # spike-aware clipping
            g = math.copysign(math.sqrt(o["threshold"] * v), g)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1 ** (t + 1))
        v_hat = v / (1 - beta2 ** (t + 1))
        scale = 1.0
        if t >= o["reset_every"] and k < o["warmup_steps"]:
            scale = 1 - 0.5 * (1 + math.cos(math.pi * (k + 1) / (o["warmup_steps"] + 1)))
        w = w - o["lr"] * o["weight_decay"] * w
        w = w - o["lr"] * scale * m_hat / (math.sqrt(v_hat) + o["eps"])
        weights.append(w)
    return weights


def spiky(steps, *shape, seed=0):
    """Gradients [steps, ...] of which one in twenty is a thousand times larger."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    spikes = torch.rand(steps, *shape, generator=generator, dtype=torch.float64) < 0.05
    return torch.where(spikes, 1000 * gradients, gradients)


def run(optimizer, parameters, gradients):
    """The weights after each step."""
    seen = []
    for step in range(len(gradients[0])):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[step].to(parameter.dtype, copy=True)
        optimizer.step()
        seen.append([parameter.detach().clone() for parameter in parameters])
    return seen


def test_it_is_the_algorithm_of_the_paper():
    start = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.0, -0.3]], dtype=torch.float64)
    parameters = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[0].clone())]
    gradients = [spiky(130, 2, 3), spiky(130, 3, seed=1)]
    seen = run(Spam(parameters, **OPTIONS), parameters, gradients)
    for index, (first, all_of) in enumerate(zip((start, start[0]), gradients, strict=True)):
        for place in range(first.numel()):
            expected = reference(
                first.flatten()[place].item(), all_of.flatten(1)[:, place].tolist(), OPTIONS
            )
            found = [step[index].flatten()[place].item() for step in seen]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_without_spikes_and_resets_it_is_adamw():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 5), torch.randn(60, 4, 5)
    found = []
    for make in (
        lambda p: Spam([p], 1e-2, weight_decay=0.1, threshold=math.inf, reset_every=1000),
        lambda p: torch.optim.AdamW([p], 1e-2, weight_decay=0.1, foreach=True),
    ):
        parameter = torch.nn.Parameter(start.clone())
        found.append(run(make(parameter), [parameter], [gradients])[-1][0])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_a_spike_does_not_stay_in_the_second_moment():
    def left_over(optimizer_class, **options):
        parameter = torch.nn.Parameter(torch.zeros(50))
        gradients = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
        gradients[30, :25] = 1e6
        optimizer = optimizer_class([parameter], 1e-2, betas=(0.9, 0.95), **options)
        run(optimizer, [parameter], [gradients])
        return optimizer.state[parameter]["exp_avg_sq"][:25].max().item()

    # 29 steps after the spike AdamW still divides by it; the clipped one has been forgotten.
    assert left_over(torch.optim.AdamW) > 1e9
    assert left_over(Spam, threshold=10.0) < 10


def test_entries_that_had_no_gradient_yet_can_start():
    parameter = torch.nn.Parameter(torch.zeros(2))
    gradients = torch.zeros(40, 2)
    gradients[:, 0] = 1.0
    gradients[30:, 1] = 1.0  # a token that is read late
    seen = run(Spam([parameter], 1e-2), [parameter], [gradients])
    assert seen[29][0][1] == 0
    assert seen[-1][0][1] < -1e-2


def test_parameters_without_a_gradient_do_no_step():
    one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = Spam([one, other], **OPTIONS)
    for step in range(6):
        one.grad = torch.ones(3)
        other.grad = torch.ones(3) if step >= 4 else None
        optimizer.step()
        if step < 4:
            assert torch.equal(other, torch.ones(3))
    assert [int(optimizer.state[p]["step"]) for p in (one, other)] == [6, 2]


@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_pieces_of_a_large_tensor_are_clipped_alike(monkeypatch, strides):
    start = torch.ones(9, 7) if strides == "rows" else torch.ones(7, 9).t()
    gradients, weights = [spiky(60, 9, 7)], []
    for piece in (1 << 16, 16):
        monkeypatch.setattr(spam, "_PIECE", piece)
        parameter = torch.nn.Parameter(start.clone())
        weights.append(run(Spam([parameter], **OPTIONS), [parameter], gradients)[-1][0])
    assert torch.equal(*weights)
    unclipped = OPTIONS | {"threshold": math.inf}
    parameter = torch.nn.Parameter(start.clone())
    other = run(Spam([parameter], **unclipped), [parameter], gradients)[-1][0]
    assert not torch.allclose(other, weights[0])


def test_state_dict_goes_on_exactly():
    gradients = [spiky(110, 6, 7)]
    whole = torch.nn.Parameter(torch.ones(6, 7))
    expected = run(Spam([whole], **OPTIONS), [whole], gradients)
    parameter = torch.nn.Parameter(torch.ones(6, 7))
    first = Spam([parameter], **OPTIONS)
    run(first, [parameter], [gradients[0][:45]])  # in the warm-up after a reset
    second = Spam([parameter], **OPTIONS)
    second.load_state_dict(first.state_dict())
    found = run(second, [parameter], [gradients[0][45:]])
    for one, other in zip(expected[45:], found, strict=True):
        assert torch.equal(one[0], other[0])


def test_a_resumed_run_repeats_exactly_across_a_reset(make_config):
    options = {
        "steps": 34,
        "optimizer": "spam",
        "spam_reset_every": 26,
        "spam_warmup_steps": 6,
        "spam_threshold": 2.0,
        "save_every": 11,
        "keep_checkpoints": 4,
    }
    whole = make_config("whole", **options)
    first = Trainer(whole)
    first.run()
    losses = [record["loss"] for record in read_metrics(whole.output_dir / METRICS_FILE)]
    assert losses[-1] < losses[0] - 1
    for step in (22, 33):  # before the reset, and in the warm-up after it
        again = make_config(f"again{step}", **options)
        again.output_dir.mkdir()
        second = Trainer(again, resume=whole.output_dir / "checkpoints" / f"step_{step:06d}")
        second.run()
        records = read_metrics(again.output_dir / METRICS_FILE)
        assert [record["loss"] for record in records] == losses[step:]
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_run_of_adamw_can_go_on_with_spam(make_config):
    config = make_config(steps=4)
    Trainer(config).run()
    longer = make_config(steps=8, optimizer="spam")
    trainer = Trainer(longer, resume=True)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, Spam)
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    trainer.run()
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}


@pytest.mark.slow
def test_sharded_weights_have_the_same_losses(make_config, tmp_path):
    options = {
        "steps": 30,
        "optimizer": "spam",
        "spam_reset_every": 24,
        "spam_warmup_steps": 4,
        "spam_threshold": 2.0,
    }
    plain, sharded = make_config("plain", **options), make_config("sharded", **options)
    Trainer(plain).run()
    save_config(sharded, tmp_path / "sharded.yaml")
    worker = Path(__file__).with_name("sharded_worker.py")
    run_two(worker, tmp_path / "sharded.yaml")
    one, two = (
        [record["loss"] for record in read_metrics(config.output_dir / METRICS_FILE)]
        for config in (plain, sharded)
    )
    assert two == pytest.approx(one, abs=1e-4)
