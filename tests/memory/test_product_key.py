import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.memory import CallContext, ProductKey, ProductKeyConfig, zeroed_values

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


def test_flops_count_what_a_token_touches():
    memory = module(key_size=8, value_size=10)
    matrices = 16 * 2 * 8 + 16 * 10 + 10 * 16 + 2 * 2 * 6 * 4
    assert memory.flops(5) == 5 * 2 * (matrices + 2 * 3 * 10)
