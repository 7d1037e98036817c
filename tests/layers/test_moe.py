"""The mixture of experts: its formula, transformers' block, and nothing that crosses tokens."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextSparseMoeBlock,
    load_balancing_loss_func,
)

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.layers.moe import (
    MixtureOfExperts,
    MixtureOfExpertsConfig,
    grouped_linear,
    one_product,
    set_balance_scale,
    takes_one_product,
)
from memlm.models.count import count
from memlm.training.optimizer import parameter_groups
from tests.memory.law_tools import build_model

EXPERTS = {"type": "moe", "num_experts": 6, "experts_per_token": 2, "intermediate_size": 10}
SHARED = {**EXPERTS, "shared_intermediate_size": 12}
LAYERS = [{"repeat": 2, "mixer": {"type": "attention", "num_heads": 2}, "ffn": SHARED}]


def build_layer(hidden_size=8, **options):
    sizes = {name: value for name, value in (SHARED | options).items() if name != "type"}
    layer = MixtureOfExperts(MixtureOfExpertsConfig(**sizes), hidden_size, 16, std=0.5)
    return layer.double()


def token_by_token(layer, hidden):
    """The formula, one token and one expert at a time."""
    results = []
    for token in hidden.flatten(0, -2):
        probabilities = (layer.router @ token).softmax(-1)
        chosen = probabilities.argsort(descending=True)[: layer.config.experts_per_token]
        weights = probabilities[chosen]
        if layer.config.normalize_weights:
            weights = weights / weights.sum()
        total = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (layer.gate_up_proj[expert] @ token).chunk(2)
            total = total + weight * (layer.down_proj[expert] @ (F.silu(gate) * up))
        if layer.shared_expert is not None:
            total = total + layer.shared_gate(token).sigmoid() * layer.shared_expert(token)
        results.append(total)
    return torch.stack(results).view_as(hidden)


def gradients(output, inputs, direction):
    return torch.autograd.grad((output * direction).sum(), inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_weights": False},
        {"shared_intermediate_size": None},
        {"experts_per_token": 1},
        {"experts_per_token": 6},
        {"num_experts": 40},  # more than pairs: experts without a token
    ],
    ids=str,
)
def test_it_is_its_formula(options):
    layer = build_layer(**options)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *layer.parameters()]
    output, expected = layer(hidden), token_by_token(layer, hidden)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(output)
    found = gradients(output, inputs, direction)
    wanted = gradients(expected, inputs, direction)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
def test_it_is_the_block_of_transformers(normalized):
    config = Qwen3NextConfig(
        hidden_size=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=10,
        shared_expert_intermediate_size=12,
        norm_topk_prob=normalized,
    )
    config._experts_implementation = "eager"
    block, layer = Qwen3NextSparseMoeBlock(config), build_layer(normalize_weights=normalized)
    block = block.double()
    names = {
        "router": "gate.weight",
        "gate_up_proj": "experts.gate_up_proj",
        "down_proj": "experts.down_proj",
        "shared_gate.weight": "shared_expert_gate.weight",
        **{f"shared_expert.{n}_proj.weight": None for n in ("gate", "up", "down")},
    }
    names = {ours: theirs or ours for ours, theirs in names.items()}
    parameters, theirs = dict(layer.named_parameters()), dict(block.named_parameters())
    assert names.keys() == parameters.keys() and set(names.values()) == theirs.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            theirs[names[name]].copy_(parameter)

    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    output, expected = layer(hidden), block(hidden)
    # Their probabilities have float32 in a model in float64.
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(output)
    found = gradients(output, [hidden, *parameters.values()], direction)
    wanted = gradients(expected, [hidden, *(theirs[names[n]] for n in parameters)], direction)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 1, 8)], ids=str)
def test_few_tokens_or_none(shape):
    layer = build_layer()
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = layer(hidden)
    assert output.shape == shape
    output.sum().backward()
    assert hidden.grad.shape == shape
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_probabilities_have_float32_in_a_narrow_model():
    layer = build_layer().bfloat16()
    hidden = torch.randn(1, 5, 8, dtype=torch.bfloat16)
    weights, experts = layer.route(hidden[0])
    assert weights.dtype == torch.float32 and experts.shape == (5, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert layer(hidden).dtype == torch.bfloat16


def test_mixed_precision_multiplies_in_the_narrow_type():
    layer = build_layer().float()
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    expected = layer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
        product = grouped_linear(hidden[0], layer.gate_up_proj[:2], torch.tensor([2, 3]))
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert layer.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 8, 0], [0, 0, 0]], ids=str)
def test_one_grouped_product_is_the_product_of_each_group(counts):
    counts = torch.tensor(counts)
    rows = torch.randn(int(counts.sum()), 16).bfloat16().requires_grad_()
    weight = torch.randn(3, 24, 16).bfloat16().requires_grad_()
    one_by_one = grouped_linear(rows, weight, counts)
    assert one_by_one.shape == (len(rows), 24)
    if len(rows) == 0:
        assert not takes_one_product(rows, weight)
        return
    assert takes_one_product(rows, weight)
    assert not takes_one_product(rows, weight[:, :9])  # rows of nine numbers are not aligned
    assert not takes_one_product(rows.float(), weight.float())
    at_once = one_product(rows, weight, counts)
    torch.testing.assert_close(at_once, one_by_one, rtol=2e-2, atol=2e-2)
    direction = torch.randn(one_by_one.shape).bfloat16()
    found = torch.autograd.grad(at_once, (rows, weight), direction)
    wanted = torch.autograd.grad(one_by_one, (rows, weight), direction)
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


def test_tokens_do_not_see_later_tokens_other_rows_or_how_a_text_is_split():
    model = build_model(LAYERS)
    ids = torch.randint(1, 40, (2, 12))
    with torch.no_grad():
        whole = model(ids, return_memory_states=True).logits
        changed = ids.clone()
        changed[0, 7:] = (ids[0, 7:] + 1) % 40
        other = model(changed).logits
        torch.testing.assert_close(other[0, :7], whole[0, :7], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other[1], whole[1], rtol=1e-9, atol=1e-9)
        head = model(ids[:, :5], return_memory_states=True)
        tail = model(ids[:, 5:], memory_states=head.memory_states)
        split = torch.cat([head.logits, tail.logits], 1)
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)
        mask = F.pad(torch.ones_like(ids), (3, 0))
        padded = model(F.pad(ids, (3, 0)), attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(padded, whole, rtol=1e-9, atol=1e-9)


def with_loss_of_balance(layer, hidden, valid, direction, factor):
    """The plain way: some loss of the output, plus the loss of balance of transformers."""
    logits = hidden.flatten(0, -2) @ layer.router.T
    config = layer.config
    balance = load_balancing_loss_func(
        (logits,), config.num_experts, config.experts_per_token, valid.to(torch.int64)
    )
    return (layer(hidden) * direction).sum() + factor * balance


@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_loss_of_balance_is_that_of_transformers(scale):
    layer, balanced = build_layer(), build_layer(balance_loss=0.3)
    balanced.load_state_dict(layer.state_dict())
    balanced.balance_scale = scale
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    direction = torch.randn_like(hidden)
    output = balanced(hidden, valid)
    assert torch.equal(output, layer(hidden))
    factor = 0.3 if scale is None else 0.3 * scale * 14  # 14 tokens
    expected = with_loss_of_balance(layer, hidden, valid, direction, factor)
    found = gradients(output, [hidden, *balanced.parameters()], direction)
    wanted = torch.autograd.grad(expected, [hidden, *layer.parameters()])
    # Theirs is summed in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_of_balance_reaches_a_model_and_leaves_padding_out():
    losses = [{**SHARED, "balance_loss": factor} for factor in (0.0, 1.0)]
    plain, balanced = (build_model([{"ffn": ffn}]) for ffn in losses)
    balanced.load_state_dict(plain.state_dict())
    ids = torch.randint(1, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    routers = {}
    for name, model in (("plain", plain), ("balanced", balanced)):
        model.train()
        for use_checkpoints in (False, True):
            if use_checkpoints:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(ids, attention_mask=mask, labels=ids).loss.backward()
            routers[name, use_checkpoints] = model.model.layers[0].ffn.module.router.grad.clone()
    torch.testing.assert_close(routers["balanced", True], routers["balanced", False])
    branch = plain.model.layers[0].ffn
    hidden = branch.norm(plain.model.embed_tokens(ids)).detach()
    logits = hidden.flatten(0, 1) @ branch.module.router.T
    balance = load_balancing_loss_func((logits,), 6, 2, mask)
    (wanted,) = torch.autograd.grad(balance, branch.module.router)
    found = routers["balanced", False] - routers["plain", False]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_one_step_in_parts_has_one_loss_of_balance():
    """Two calls of equal tokens count half each."""
    layer = build_layer(balance_loss=1.0)
    hidden = torch.randn(2, 6, 8, dtype=torch.float64)
    mean = 0
    for row in hidden:
        layer.zero_grad()
        (layer(row) * 0).sum().backward()
        mean = mean + layer.router.grad / 2
    set_balance_scale(layer, 1 / 12)
    layer.zero_grad()
    for row in hidden:
        (layer(row) * 0).sum().backward()
    torch.testing.assert_close(layer.router.grad, mean)
    assert mean.abs().sum() > 0


def test_it_learns():
    torch.manual_seed(1)
    model = MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=LAYERS))
    ids = torch.randint(1, 20, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    router = model.model.layers[0].ffn.module.router
    assert router.grad.abs().sum() > 0


def test_new_weights_have_the_spread_of_the_config():
    config = MemLMConfig(hidden_size=64, initializer_range=0.3, layers=LAYERS)
    module = MemLMForCausalLM(config).model.layers[1].ffn.module
    for name, parameter in module.named_parameters():
        assert float(parameter.detach().std()) == pytest.approx(0.3, rel=0.2), name


def test_experts_are_no_matrices_for_muon():
    layers = [{"mixer": None, "ffn": {**SHARED, "num_experts": 16, "intermediate_size": 16}}]
    groups = parameter_groups(MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers)))
    stacks = {"router", "gate_up_proj", "down_proj", "shared_gate.weight"}
    found = {name.split("ffn.module.")[-1] for name in groups["others"]}
    assert stacks <= found


def test_a_token_uses_some_of_the_parameters_and_their_work():
    config = MemLMConfig(vocab_size=40, hidden_size=8, layers=LAYERS[:1])
    result = count(config, length=4)
    expert = 3 * 8 * 10
    assert result.idle == 2 * 4 * expert
    assert result.active == result.parameters - result.idle
    used = 6 * 8 + 2 * expert + 3 * 8 * 12 + 8
    assert build_layer().flops(5) == 2 * 5 * used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"experts_per_token": 7}, "experts_per_token 7 is more than num_experts 6"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size must be at least 1"),
        ({"balance_loss": -1}, "balance_loss must be at least 0 and finite, got -1"),
        ({"num_expert": 4}, "did you mean 'num_experts'"),
    ],
    ids=str,
)
def test_impossible_sizes_are_one_clear_line(options, message):
    layer = {"mixer": "attention", "ffn": {**EXPERTS, **options}}
    with pytest.raises(UserError, match=message) as error:
        MemLMConfig.from_mapping({"hidden_size": 64, "layers": [layer]})
    assert "layers.0.ffn" in str(error.value) and "\n" not in str(error.value)
