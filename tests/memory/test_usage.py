import math

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.memory import CallContext, ProductKey, ProductKeyConfig, UsageStatistics, record_usage
from memlm.memory.usage import SlotUsage

SIZES = {"num_keys": 6, "num_heads": 2, "top_k": 3}


def module(**options):
    torch.manual_seed(0)
    return ProductKey(ProductKeyConfig(**{**SIZES, **options}), hidden_size=16)


def model(**options):
    torch.manual_seed(0)
    ffn = {"type": "product_key", **SIZES, **options}
    layers = [{"repeat": 2, "mixer": "attention", "ffn": ffn}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers))


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
        assert recorded.counts.sum() == recorded.reads == 3 * reads
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
    assert torch.equal(recorded.counts, torch.bincount(slots, minlength=36).int())


def test_half_keys_are_counted_by_head_and_half():
    recorder = SlotUsage(36, half_keys=(2, 6))
    indices = torch.randint(36, (7, 2, 3), dtype=torch.int32)
    weights = torch.rand(7, 2, 3)
    for _ in range(2):
        recorder.record(indices, weights)
    expected = torch.zeros(2, 2, 6, dtype=torch.int32)
    slots = torch.zeros(36)
    for token, read in enumerate(indices.tolist()):
        for head, chosen in enumerate(read):
            for place, slot in enumerate(chosen):
                expected[head, 0, slot // 6] += 2
                expected[head, 1, slot % 6] += 2
                slots[slot] += 2 * weights[token, head, place]
    assert torch.equal(recorder.half_keys, expected)
    torch.testing.assert_close(recorder.weights, slots)
    recorder.clear()
    assert recorder.reads == 0 and recorder.counts.sum() == recorder.weights.sum() == 0
    assert torch.equal(recorder.half_keys, expected)


def test_counting_alone_keeps_no_weights():
    recorder = SlotUsage(36, weighted=False)
    recorder.record(torch.zeros(4, 1, 2, dtype=torch.int32), torch.full((4, 1, 2), 0.5))
    assert recorder.weights is None and recorder.half_keys is None
    assert recorder.counts[0] == recorder.reads == 8
