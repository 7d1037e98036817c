import pytest
import torch

from memlm.config import TrainConfig
from memlm.errors import UserError
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.training.optimizer import (
    build_optimizers,
    parameter_groups,
    set_learning_rates,
    table_updates,
)
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.spam import Spam


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    layers = [
        {
            "mixer": {"type": "sliding_attention", "window": 8, "num_heads": 2, "conv_size": 4},
            "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 16},
            "ffn": "swiglu",
        },
        {"mixer": "attention", "ffn": {"type": "product_key", "num_keys": 8, "top_k": 2}},
    ]
    config = MemLMConfig(
        vocab_size=40, hidden_size=32, layers=layers, tie_word_embeddings=request.param
    )
    return MemLMForCausalLM(config)


def test_every_parameter_has_exactly_one_group(model):
    names = [name for group in parameter_groups(model).values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_groups(model):
    groups = parameter_groups(model)
    parameters = dict(model.named_parameters())
    where = {name: group for group, names in groups.items() for name in names}
    assert where["model.embed_tokens.weight"] == "others"
    assert where.get("lm_head.weight", "others") == "others"
    assert where["model.layers.0.mixer.module.q_proj.weight"] == "matrices"
    assert where["model.layers.0.ffn.module.down_proj.weight"] == "matrices"
    for name, parameter in parameters.items():
        if name.endswith(("A_log", "dt_bias", "norm.weight", "bias")):
            assert where[name] == "no_decay", name
        if "conv" in name:
            assert where[name] != "matrices", name
        if where[name] == "matrices":
            assert parameter.ndim == 2 and min(parameter.shape) >= 16
    assert len(groups["values"]) == 1
    assert parameters[groups["values"][0]].shape[0] == 64  # 8 x 8 slots


def test_muon_takes_the_matrices_and_adamw_the_rest(model):
    config = TrainConfig(optimizer="muon", weight_decay=0.2)
    adamw, muon = build_optimizers(model, config)
    assert isinstance(muon, torch.optim.Muon)
    taken = sum(len(group["params"]) for group in muon.param_groups)
    assert taken == len(parameter_groups(model)["matrices"])
    counts = [len(group["params"]) for o in (adamw, muon) for group in o.param_groups]
    assert sum(counts) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.2, 0.0, 0.0]
    (single,) = build_optimizers(model, TrainConfig(optimizer="adamw"))
    assert isinstance(single, torch.optim.AdamW)


def test_spam_takes_all_but_the_value_tables(model):
    config = TrainConfig(
        optimizer="spam",
        learning_rate=1.0,
        weight_decay=0.2,
        betas=(0.8, 0.9),
        spam_threshold=50.0,
        spam_reset_every=20,
        spam_warmup_steps=7,
    )
    spam, adamw = build_optimizers(model, config)
    assert isinstance(spam, Spam) and isinstance(adamw, torch.optim.AdamW)
    assert (spam.threshold, spam.reset_every, spam.warmup_steps) == (50.0, 20, 7)
    assert [group["weight_decay"] for group in spam.param_groups] == [0.2, 0.0]
    assert [group["betas"] for group in spam.param_groups] == [(0.8, 0.9)] * 2
    (table,) = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert table.shape[0] == 64
    counts = [len(group["params"]) for group in spam.param_groups]
    assert sum(counts) + 1 == len(list(model.parameters()))
    set_learning_rates([spam, adamw], 0.5)
    assert [g["lr"] for o in (spam, adamw) for g in o.param_groups] == [0.5, 0.5, 1e-3]


@pytest.mark.parametrize("optimizer", ["adamw", "spam", "muon"])
def test_decay_spares_norms_decay_rates_and_tables(model, optimizer):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for one in build_optimizers(model, config)
        for group in one.param_groups
        for parameter in group["params"]
    }
    parameters, (table,) = dict(model.named_parameters()), parameter_groups(model)["values"]
    assert decays.keys() == parameters.keys()
    for name, decay in decays.items():
        spared = name == table or name.endswith("A_log") or parameters[name].ndim == 1
        assert decay == (0.0 if spared else 0.2), name


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(33)]
    results = []
    for fused in (True, False):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = torch.optim.AdamW(parameters, 1e-2, fused=fused)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"train.betas: each must be in \[0, 1\), got \[0.9, 1.0\]"),
        ({"weight_decay": -0.1}, "train.weight_decay: must be at least 0, got -0.1"),
        ({"spam_threshold": 0.5}, "train.spam_threshold: must be at least 1, got 0.5"),
        ({"spam_threshold": float("nan")}, "train.spam_threshold: .* got nan"),
        ({"spam_reset_every": 0}, "train.spam_reset_every: must be at least 1, got 0"),
        ({"spam_warmup_steps": -1}, "train.spam_warmup_steps: must be at least 0, got -1"),
        ({"spam_reset_every": 100}, "train.spam_warmup_steps: 150 steps .* 100 apart"),
    ],
)
def test_bad_options_of_the_optimizers(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_value_tables_keep_their_rate(model):
    config = TrainConfig(optimizer="muon", learning_rate=1.0, muon_learning_rate=2.0)
    optimizers = build_optimizers(model, config)
    for factor in (0.5, 0.1):
        set_learning_rates(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [factor, factor, 1e-3, 2 * factor]


def test_frozen_parameters_are_left_out(model):
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    for optimizer in build_optimizers(model, TrainConfig()):
        for group in optimizer.param_groups:
            assert all(parameter is not frozen for parameter in group["params"])


def tables(**options):
    """A model of two layers with 64 x 64 slots, of which a token reads 4."""
    ffn = {"type": "product_key", "num_keys": 64, "num_heads": 2, "top_k": 2, "key_size": 4}
    layers = [{"repeat": 2, "mixer": "attention", "ffn": ffn | options}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=40, hidden_size=32, layers=layers))


def test_a_table_that_a_step_reads_little_of_is_updated_by_rows():
    model = tables()
    few, many = (TrainConfig(tokens_per_step=n, length=32) for n in (64, 8192))
    for config, method in ((few, "lazy_adam"), (many, "adam")):
        updates = table_updates(model, config)
        assert [one.method for one in updates] == [method] * 2
        assert "of 4,096 rows" in updates[0].reason
        assert f"{4 * config.tokens_per_step:,} reads" in updates[0].reason
    # Two layers that share a table read twice as many of its rows.
    (shared,) = table_updates(tables(share="table"), few)
    assert "512 reads" in shared.reason and shared.name == "model.shared.table"
    names = [name for group in parameter_groups(model).values() for name in group]
    adamw, rows = build_optimizers(model, few)
    assert isinstance(rows, RowOptimizer) and rows.method == "lazy_adam"
    in_adamw = sum(len(group["params"]) for group in adamw.param_groups)
    assert in_adamw + len(rows.param_groups[0]["params"]) == len(names)


def test_the_rows_keep_their_own_constant_rate():
    config = TrainConfig(
        value_optimizer="rowwise_adagrad", value_learning_rate=0.5, betas=(0.8, 0.9)
    )
    optimizers = build_optimizers(tables(), config)
    rows = optimizers[-1]
    assert rows.method == "rowwise_adagrad" and rows.param_groups[0]["weight_decay"] == 0
    set_learning_rates(optimizers, 0.1)
    assert rows.param_groups[0]["lr"] == 0.5
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * config.learning_rate)
    (adamw,) = build_optimizers(tables(), TrainConfig(value_optimizer="adam"))
    assert [group.get("fused") for group in adamw.param_groups] == [True] * 3
