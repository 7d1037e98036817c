"""Mixtures of experts in a run: what keeps all of them in use."""

import torch

from memlm.training import Trainer

MIXER = {"type": "sliding_attention", "window": 16, "num_heads": 2}


def trained(make_config, name, balance_loss, **options):
    """The layer of experts after a run that began with a few of eight in use, and the share of the
    tokens that the busiest one had at the end: from 2 / 8, where all are used alike, to 1."""
    ffn = {"type": "moe", "num_experts": 8, "intermediate_size": 16, "balance_loss": balance_loss}
    model = {"layers": [{"mixer": MIXER, "ffn": ffn}]}
    trainer = Trainer(make_config(name, model=model, optimizer="adamw", **options))
    branch = trainer.model.model.layers[0].ffn
    with torch.no_grad():  # experts 0 and 1, by the sign of the first channel
        branch.norm.weight.fill_(0.01)[0] = 1
        branch.module.router[:, 0] = torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0, 0])
    counts = []

    def count(module, inputs, output):
        _, experts = module.route(inputs[0].flatten(0, -2))
        counts.append(torch.bincount(experts.flatten(), minlength=8))

    branch.module.register_forward_hook(count)
    trainer.run()
    last = torch.stack(counts[-16:]).sum(0)
    return branch.module, float(last.max() / last.sum() * 2)


def test_the_loss_of_balance_brings_all_experts_into_use(make_config):
    options = {"steps": 40, "micro_batch_rows": 2}
    _, without = trained(make_config, "without", 0.0, **options)
    module, balanced = trained(make_config, "balanced", 0.1, **options)
    assert module.balance_scale == 1 / 256  # of the tokens of a step
    assert without > 0.9 and balanced < 0.7
