import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.cuda import product_key_select
from memlm.errors import UserError
from memlm.memory import CallContext, ProductKey, ProductKeyConfig, zeroed_values
from memlm.memory import query_norm as norms
from memlm.memory.query_norm import QueryBatchNorm, average_running_statistics

SIZES = {"num_keys": 6, "num_heads": 2, "top_k": 3}


def module(**options):
    torch.manual_seed(0)
    return ProductKey(ProductKeyConfig(**{**SIZES, **options}), hidden_size=16)


def model(**options):
    torch.manual_seed(0)
    ffn = {"type": "product_key", **SIZES, **options}
    layers = [{"repeat": 2, "mixer": "attention", "ffn": ffn}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers))


def reads(memory, x):
    """Slots and weights [tokens, bag] that the memory reads for tokens x."""
    query = memory.query_norm(memory.query_proj(x).view(len(x), 2, 2, -1))
    indices, weights = product_key_select(query, memory.keys, 3)
    return indices.flatten(1).long(), weights.flatten(1)


@pytest.mark.parametrize("value_size", [None, 10])
@pytest.mark.parametrize("gated", [False, True])
def test_plain_is_the_weighted_sum(value_size, gated):
    memory = module(variant="plain", value_size=value_size, gated=gated)
    hidden = torch.randn(1, 5, 16)
    out = memory(hidden, None, CallContext.plain(1, 5))[0][0]
    indices, weights = reads(memory, hidden[0])
    expected = (weights[..., None] * memory.values.weight[indices]).sum(1)
    assert (memory.o_proj is None) == (value_size is None) and memory.gate_proj is None
    if value_size is not None:
        expected = memory.o_proj(expected)
    if gated:
        expected = expected * memory.scalar_gate(hidden[0]).sigmoid()
    torch.testing.assert_close(out, expected)


def test_peer_sums_experts_of_one_hidden_unit():
    memory = module(variant="peer")
    hidden = torch.randn(1, 5, 16)
    out = memory(hidden, None, CallContext.plain(1, 5))[0][0]
    indices, weights = reads(memory, hidden[0])
    down, up = (getattr(memory.values, name).weight for name in ("down", "up"))
    for t, x in enumerate(hidden[0]):
        chosen = zip(indices[t], weights[t], strict=True)
        experts = [w * F.gelu(down[i] @ x) * up[i] for i, w in chosen]
        torch.testing.assert_close(out[t], torch.stack(experts).sum(0))


@pytest.mark.parametrize("variant", ["memory_plus", "plain", "peer"])
@pytest.mark.parametrize("query_norm", ["batch", "layer"])
def test_every_parameter_of_every_variant_learns(variant, query_norm):
    memory = module(variant=variant, query_norm=query_norm, gated=True)
    memory(torch.randn(4, 9, 16), None, CallContext.plain(4, 9))[0].square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_start_values_follow_the_papers():
    sizes = {"num_keys": 64, "num_heads": 2, "top_k": 4}
    for variant, bound in (("plain", 16**-0.5), ("peer", 32**-0.5)):
        memory = ProductKey(ProductKeyConfig(**sizes, variant=variant), hidden_size=64)
        assert 0.95 * bound < memory.keys.abs().max() <= bound
        for name, parameter in memory.values.named_parameters():
            assert parameter.std().item() == pytest.approx(64**-0.5, rel=0.02), name


def test_experts_have_the_width_of_the_model():
    with pytest.raises(UserError, match="value_size is 10, but the experts of variant peer"):
        module(variant="peer", value_size=10)


@pytest.mark.parametrize("variant, tables", [("memory_plus", 1), ("peer", 2)])
def test_a_shared_table_is_stored_once(variant, tables, tmp_path):
    shared = model(variant=variant, share="table", query_norm="batch")
    ids = torch.randint(20, (2, 7))
    shared(ids)
    shared.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = [name for name, tensor in stored.items() if tensor.shape == (36, 16)]
    assert len(found) == tables and all(".shared.table." in name for name in found)
    again = MemLMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, shared(ids).logits)
    # Both layers read the one table.
    before = again(ids).logits
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if ".shared." in name:
                parameter.zero_()
        assert not torch.equal(again(ids).logits, before)
        with zeroed_values(shared):
            torch.testing.assert_close(shared(ids).logits, again(ids).logits)


def test_plain_memory_stands_beside_a_feed_forward_layer():
    memory = {"type": "product_key", **SIZES, "variant": "plain", "parallel": True, "gate": 0.0}
    layer = {"mixer": "attention", "memory": memory, "ffn": "swiglu"}
    both = MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=[layer])).eval()
    ids = torch.randint(20, (2, 7))
    assert torch.equal(both(ids).logits, both(ids, use_memory=False).logits)  # its gain starts at 0
    both(ids, labels=ids).loss.backward()
    assert both.model.layers[0].memory.gate.grad.abs().sum() > 0


# --- batch normalisation ---


def test_batch_norm_normalises_over_the_tokens_in_training():
    norm, ours = torch.nn.BatchNorm1d(12), QueryBatchNorm(12)
    for _ in range(3):
        query = 3 * torch.randn(7, 3, 2, 2) + 1
        expected = norm(query.flatten(1)).view_as(query)
        torch.testing.assert_close(ours(query), expected)
    torch.testing.assert_close(ours.running_mean, norm.running_mean)
    torch.testing.assert_close(ours.running_var, norm.running_var)
    norm.eval(), ours.eval()
    torch.testing.assert_close(ours(query), norm(query.flatten(1)).view_as(query))
    # A single token has no variance; half precision is normalised in float32.
    single = ours.train()(query[:1])
    torch.testing.assert_close(single, ours.eval()(query[:1]))
    assert ours.bfloat16().train()(1e3 + query.bfloat16()).isfinite().all()


def test_batch_norm_leaves_padding_out():
    tiny = model(query_norm="batch").train()
    ids = torch.randint(1, 20, (1, 7))
    plain = tiny(ids).logits
    statistics = {name: value.clone() for name, value in tiny.named_buffers()}
    assert len(statistics) == 4
    padded = model(query_norm="batch").train()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    logits = padded(torch.cat([ids[:, :3], ids], 1), attention_mask=mask).logits
    torch.testing.assert_close(logits[:, 3:], plain)
    for name, value in padded.named_buffers():
        torch.testing.assert_close(value, statistics[name])


def test_batch_norm_counts_recomputed_calls_once():
    ids = torch.randint(20, (2, 7))
    results = []
    for checkpointing in (False, True):
        tiny = model(query_norm="batch").train()
        if checkpointing:
            tiny.gradient_checkpointing_enable()
        tiny(ids, labels=ids).loss.backward()
        results.append(dict(tiny.named_buffers()))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])
        assert value.std() > 0


def test_batch_norm_warns_once_and_only_in_training():
    norms._warn_of_later_tokens.cache_clear()
    tiny = model(query_norm="batch").eval()
    ids = torch.randint(20, (2, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(ids)
    with pytest.warns(UserWarning, match="every token sees later ones") as caught:
        tiny.train()(ids)
        tiny(ids)
    assert len(caught) == 1


def test_running_statistics_of_processes_are_those_of_all_their_tokens():
    parts = [torch.randn(50, 1, 2, 2), 2 * torch.randn(50, 1, 2, 2) + 1]
    norms = [QueryBatchNorm(4, momentum=1.0) for _ in parts]
    for norm, part in zip(norms, parts, strict=True):
        norm(part)
    other = norms[1]
    apart = other.running_mean - (norms[0].running_mean + other.running_mean) / 2
    theirs = iter([other.running_mean, other.running_var + apart.square()])
    average_running_statistics(norms[0], lambda mine: (mine + next(theirs)) / 2)
    together = torch.cat(parts).flatten(1)
    torch.testing.assert_close(norms[0].running_mean, together.mean(0))
    torch.testing.assert_close(norms[0].running_var, together.var(0), rtol=0.02, atol=0)
