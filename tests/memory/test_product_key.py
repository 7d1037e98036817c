import math

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.memory import (
    CallContext,
    ProductKey,
    ProductKeyConfig,
    UsageStatistics,
    record_usage,
    zeroed_values,
)

SIZES = {"num_keys": 6, "num_heads": 2, "top_k": 3}


def module(**options):
    torch.manual_seed(0)
    return ProductKey(ProductKeyConfig(**{**SIZES, **options}), hidden_size=16)


def model(**options):
    torch.manual_seed(0)
    ffn = {"type": "product_key", **SIZES, **options}
    layers = [{"repeat": 2, "mixer": "attention", "ffn": ffn}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers))


@pytest.mark.parametrize("query_norm", ["layer", "none"])
def test_output_is_the_formula(query_norm):
    memory = module(query_norm=query_norm, key_size=4, value_size=10)
    hidden = torch.randn(1, 5, 16)
    out, state = memory(hidden, None, CallContext.plain(1, 5))
    assert state is None
    for t in range(5):
        x = hidden[0, t]
        y = torch.zeros(10)
        queries = memory.query_proj(x).view(2, 2, 2)
        for h in range(2):
            halves = queries[h]
            if query_norm == "layer":
                halves = (halves - halves.mean(-1, keepdim=True)) / (
                    halves.var(-1, keepdim=True, unbiased=False) + 1e-5
                ).sqrt()
            first, second = (memory.keys[h, p] @ halves[p] for p in (0, 1))
            scores = (first[:, None] + second[None, :]).flatten()
            best = scores.topk(3)
            y = y + best.values.softmax(-1) @ memory.values.weight[best.indices]
        expected = memory.o_proj(y * torch.nn.functional.silu(memory.gate_proj(x)))
        torch.testing.assert_close(out[0, t], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    memory = module()
    memory(torch.randn(4, 9, 16), None, CallContext.plain(4, 9))[0].square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_layers_share_one_table():
    alone, shared = model(), model(share="table")
    table = 6 * 6 * 16
    assert shared.num_parameters() == alone.num_parameters() - table
    ids = torch.randint(20, (2, 7))
    shared(ids, labels=ids).loss.backward()
    tables = [p for name, p in shared.named_parameters() if p.shape == (36, 16)]
    assert len(tables) == 1 and tables[0].grad.abs().sum() > 0
    # Both layers read it: with either one cut off, the table still gets a gradient.
    for layer in shared.model.layers:
        assert layer.ffn.module.values is None


def test_start_values_follow_the_paper():
    torch.manual_seed(0)
    memory = ProductKey(ProductKeyConfig(num_keys=64, num_heads=2, top_k=4), hidden_size=64)
    assert memory.keys.abs().max() <= 32**-0.5
    assert memory.keys.abs().max() > 0.95 * 32**-0.5
    assert memory.values.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert memory.o_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    defaults = ProductKeyConfig()
    assert defaults.sizes(1024) == (512, 1024)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_keys": 0}, "num_keys is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"value_size": -1}, "value_size is -1"),
        ({"key_size": 7}, "key_size is 7, it must be a positive even number"),
        ({"key_size": 0}, "key_size is 0, it must be a positive even number"),
        ({"top_k": 7}, "top_k 7 is more than num_keys 6"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        module(**options)


@pytest.mark.parametrize("share", [None, "table"])
def test_zeroed_values(share):
    tiny = model(share=share).eval()
    ids = torch.randint(20, (2, 7))
    with torch.no_grad():
        before = tiny(ids).logits
        with zeroed_values(tiny):
            ablated = tiny(ids).logits
        after = tiny(ids).logits
        for parameter in tiny.parameters():
            if parameter.shape == (36, 16):
                parameter.zero_()
        really_zero = tiny(ids).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, ablated)
    torch.testing.assert_close(ablated, really_zero)
    with pytest.raises(RuntimeError, match="inside"), zeroed_values(tiny):
        raise RuntimeError("inside")
    assert not any(getattr(part, "zeroed", False) for part in tiny.modules())


def test_usage_statistics_of_known_masses():
    even = UsageStatistics.of(torch.ones(200))
    assert even.used == 1 and even.top1_mass == pytest.approx(0.01)
    assert even.top10_mass == pytest.approx(0.1)
    assert even.kl_to_uniform == pytest.approx(0, abs=1e-12)
    assert even.gini == pytest.approx(0, abs=1e-12)

    one = torch.zeros(200)
    one[7] = 3.0
    single = UsageStatistics.of(one)
    assert single.used == 1 / 200 and single.top1_mass == single.top10_mass == 1
    assert single.kl_to_uniform == pytest.approx(math.log(200))
    assert single.gini == pytest.approx(199 / 200)

    # Masses 1, 2, 3, 4: gini = sum |xi - xj| / (2 n^2 mean) = 20 / (2 * 16 * 2.5).
    steps = UsageStatistics.of(torch.tensor([4, 1, 3, 2]))
    assert steps.gini == pytest.approx(20 / 80)
    assert steps.top1_mass == steps.top10_mass == pytest.approx(0.4)
    assert math.isnan(UsageStatistics.of(torch.zeros(5)).gini)


def test_record_usage_counts_reads_without_padding():
    tiny = model().eval()
    ids = torch.randint(1, 20, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    with torch.no_grad(), record_usage(tiny) as usage:
        tiny(ids, attention_mask=mask)
        tiny(ids[:1])
    tiny(ids)  # no longer recorded
    assert list(usage) == ["model.layers.0.ffn.module", "model.layers.1.ffn.module"]
    for recorded in usage.values():
        reads = (11 + 7) * 2  # tokens x heads; each head's weights sum to 1
        assert recorded.counts.sum() == 3 * reads
        assert recorded.weights.sum().item() == pytest.approx(reads)
        assert 0 < recorded.by_count().used == recorded.by_weight().used <= 1
        assert recorded.by_count().kl_to_uniform != recorded.by_weight().kl_to_uniform
    assert {name for name, _ in tiny.named_buffers()} == set()
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name])


def test_usage_names_the_slots_that_were_read():
    memory = module(num_heads=1, top_k=1)
    hidden = torch.randn(1, 4, 16)
    with torch.no_grad(), record_usage(memory) as usage:
        memory(hidden, None, CallContext.plain(1, 4))
        recorded = usage[""]
        queries = memory.query_norm(memory.query_proj(hidden[0]).view(4, 2, 4))
        first, second = (queries[:, p] @ memory.keys[0, p].T for p in (0, 1))
        slots = first.argmax(-1) * 6 + second.argmax(-1)
    assert torch.equal(recorded.counts, torch.bincount(slots, minlength=36))


def test_flops_count_what_a_token_touches():
    memory = module(key_size=8, value_size=10)
    matrices = 16 * 2 * 8 + 16 * 10 + 10 * 16 + 2 * 2 * 6 * 4
    assert memory.flops(5) == 5 * 2 * (matrices + 2 * 3 * 10)
