"""Probes of associative memories: weights made by hand, and slow ways to the same numbers."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.data.synthetic.bigrams import Bigrams
from memlm.errors import UserError
from memlm.evaluation.probes import probe_associations
from memlm.evaluation.probes.__main__ import main
from memlm.evaluation.probes.associative import attention_weights
from memlm.models import MemLMConfig, MemLMForCausalLM

TOKENS = 8
TASK = Bigrams(tokens=TOKENS, triggers=2, concentration=1.0)


def make_model(layers, hidden_size=24, vocab_size=TOKENS, **more) -> MemLMForCausalLM:
    torch.manual_seed(0)
    config = MemLMConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        initializer_range=0.5,
        tie_word_embeddings=False,
        **more,
    )
    return MemLMForCausalLM(config).eval()


@torch.no_grad()
def ideal_induction_head() -> MemLMForCausalLM:
    """Three orthogonal blocks of channels: the token, the one before it, the one to be told next.

    The norm makes sqrt(24) of one channel alone.
    """
    first = {"type": "attention", "num_heads": 1, "head_dim": 16, "qkv_bias": True}
    second = {"type": "attention", "num_heads": 1, "head_dim": TOKENS, "rope": False}
    model = make_model([{"mixer": first}, {"mixer": second}])
    for parameter in model.parameters():
        if parameter.dim() > 1 or parameter.shape != (24,):
            parameter.zero_()
    one, size = torch.eye(TOKENS), math.sqrt(24)
    token, before, told = (slice(n * TOKENS, (n + 1) * TOKENS) for n in range(3))
    model.model.embed_tokens.weight[:, token] = one

    layer = model.model.layers[0].mixer.module
    # Alike for all tokens: the query is the key turned back by one position.
    key = torch.full((8,), 30.0, dtype=torch.complex128)
    turn = torch.polar(torch.ones(8).double(), -(10000.0 ** (-torch.arange(8) / 8)).double())
    layer.k_proj.bias[:] = torch.cat([key.real, key.imag])
    layer.q_proj.bias[:] = torch.cat([(key * turn).real, (key * turn).imag])
    layer.v_proj.weight[:TOKENS, token] = one / size
    layer.o_proj.weight[before, :TOKENS] = one

    layer = model.model.layers[1].mixer.module
    triggers = torch.zeros(TOKENS)
    triggers[torch.from_numpy(TASK.trigger_tokens())] = 50
    layer.q_proj.weight[:, token] = triggers.diag()
    layer.k_proj.weight[:, before] = one
    # The first token has none before it and copies itself; a true match is better than that.
    layer.k_proj.weight[:, token] = -one / 2
    layer.v_proj.weight[:, token] = one
    layer.o_proj.weight[told] = one

    model.lm_head.weight[:, token] = torch.from_numpy(np.log(TASK.chain).T.copy()).float() / size
    model.lm_head.weight[:, told] = 100 * one
    return model


def test_an_ideal_induction_head() -> None:
    # No row of this seed begins with a trigger that follows itself: there the first token, which
    # copies itself, looks like those behind the trigger.
    found = probe_associations(ideal_induction_head(), TASK, length=64, rows=12, seed=4)
    first, second = found.heads
    assert (first.layer, first.head, second.layer, second.head) == (0, 0, 1, 0)
    assert first.previous_token == 1
    assert first.previous_weight == pytest.approx(1, abs=1e-3)
    assert second.key_query == [1]
    assert second.output_value == 1
    assert second.induction == 1
    assert second.induction_weight == pytest.approx(1, abs=1e-3)
    assert found.bigram_kl_bits == pytest.approx(0, abs=1e-6)
    assert found.measures["in_context_accuracy"] == 1
    assert found.in_context_bits == pytest.approx(0, abs=1e-3)
    # The first layer writes where the head does not read: all candidates are alike, the first wins.
    assert first.output_value == found.chance == 1 / TOKENS
    assert first.key_query == []
    rows = TASK.chain
    entropy = -(rows * np.log2(rows)).sum(1)
    others = np.setdiff1d(np.arange(TOKENS), TASK.trigger_tokens())
    wanted = np.average(math.log2(TOKENS) - entropy[others], weights=TASK.start[others])
    assert found.uniform_kl_bits == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("broken", "probe"),
    [
        ("layers.0.mixer.module.q_proj.bias", lambda found: found.heads[0].previous_token),
        ("layers.0.mixer.module.o_proj.weight", lambda found: found.heads[1].key_query[0]),
        ("layers.1.mixer.module.k_proj.weight", lambda found: found.heads[1].induction),
        ("layers.1.mixer.module.v_proj.weight", lambda found: found.heads[1].output_value),
    ],
)
def test_a_broken_part_is_found_by_its_probe(broken, probe) -> None:
    model = ideal_induction_head()
    model.model.get_parameter(broken).data.zero_()
    assert probe(probe_associations(model, TASK, length=64, rows=12, seed=4)) < 0.6


MIXERS = [
    {"type": "attention", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "qk_norm": True},
    {"type": "sliding_attention", "window": 3, "num_heads": 2, "qkv_bias": True, "rope": False},
]


def test_weights_are_those_of_the_module() -> None:
    # With the head of a third layer, hidden states tell what each of the first two adds.
    model = make_model([*({"mixer": mixer} for mixer in MIXERS), {"mixer": "attention"}])
    ids = torch.randint(TOKENS, (2, 7))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        for layer, (given, following) in enumerate(pairwise(hidden[:3])):
            branch = model.model.layers[layer].mixer
            attention, normed = branch.module, branch.norm(given)
            weights = attention_weights(attention, normed)
            values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
            values = values.repeat_interleave(attention.num_key_value_groups, 2)
            heads = torch.einsum("bhts,bshd->bthd", weights, values).flatten(2)
            torch.testing.assert_close(following - given, attention.o_proj(heads))


def _normed(vector: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).mean() + 1e-6) * weight


def _turned(vector: np.ndarray, position: int) -> np.ndarray:
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    pairs = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


def test_recall_is_what_loops_over_heads_tokens_and_distances_find() -> None:
    length, heads, size = 6, 4, 6
    task = Bigrams(tokens=TOKENS, triggers=3, fixed_triggers=False, concentration=1.0)
    model = make_model([{"repeat": 2, "mixer": MIXERS[0], "ffn": "swiglu"}], vocab_size=TOKENS + 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    found = probe_associations(model, task, length=length, rows=2)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def recall(scores):
        return np.mean([np.argmax(row) == token for token, row in enumerate(scores)])

    embedded, copies = weights["model.embed_tokens.weight"][:TOKENS], {}
    for layer in range(2):
        at = f"model.layers.{layer}.mixer."
        query, key, value, output = (weights[f"{at}module.{x}_proj.weight"] for x in "qkvo")
        gain, query_gain = weights[f"{at}norm.weight"], weights[f"{at}module.q_norm.weight"]
        key_gain = weights[f"{at}module.k_norm.weight"]
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // 2 * size, (head // 2 + 1) * size)
            copies[layer, head] = [
                output[:, own] @ value[shared] @ _normed(token, gain) for token in embedded
            ]
            logits = [
                weights["lm_head.weight"][:TOKENS] @ _normed(copy, weights["model.norm.weight"])
                for copy in copies[layer, head]
            ]
            assert found.heads[heads * layer + head].output_value == recall(logits)
            for before in range(heads if layer else 0):
                keys = [
                    _normed(key[shared] @ _normed(copy, gain), key_gain)
                    for copy in copies[0, before]
                ]
                scores = []
                for token in embedded:
                    asked = _normed(query[own] @ _normed(token, gain), query_gain)
                    turned = [_turned(asked, distance) for distance in range(1, length)]
                    scores.append([np.mean([q @ k for q in turned]) for k in keys])
                assert found.heads[heads + head].key_query[before] == recall(scores)


def test_random_weights_recall_by_chance() -> None:
    task = Bigrams(tokens=64)
    model = make_model([{"repeat": 2, "mixer": {"type": "attention", "num_heads": 4}}], 64, 64)
    found = probe_associations(model, Bigrams(tokens=64, fixed_triggers=False), 32, 4)
    recalls = [recall for one in found.heads for recall in (one.output_value, *one.key_query)]
    # 24 numbers of 64 tries each: five standard deviations of their mean are 0.016.
    assert np.mean(recalls) == pytest.approx(1 / 64, abs=0.016)
    assert found.bigram_kl_bits > 1
    assert probe_associations(model, task, 32, 4).heads[0].previous_token < 0.5


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"mixer": "attention"}], "needs two layers"),
        ([{"repeat": 2, "mixer": "gated_delta"}], "layer 0 has the mixer gated_delta; valid are"),
        ([{"mixer": "attention"}, {"ffn": "swiglu"}], "layer 1 has the mixer none"),
        ([{"repeat": 2, "mixer": "attention", "memory": "retention"}], "the memory retention"),
        ([{"repeat": 2, "mixer": "attention", "ffn": {"type": "moe", "num_experts": 2,
           "experts_per_token": 1}}], "layer 0 has the ffn moe"),
        ([{"repeat": 2, "mixer": {"type": "attention", "conv_size": 3}}], "has a convolution"),
        ([{"repeat": 2, "mixer": {"type": "attention", "output_gate": True}}], "has a gate of its"),
        ([{"repeat": 2, "mixer": "attention", "norm": "post"}], "layer 0 has norm: post"),
    ],
)  # fmt: skip
def test_other_models_are_refused(layers, message) -> None:
    with pytest.raises(UserError, match=message):
        probe_associations(make_model(layers), TASK)


def test_what_cannot_be_probed() -> None:
    layers = [{"repeat": 2, "mixer": "attention"}]
    with pytest.raises(UserError, match="has an output memory"):
        probe_associations(make_model(layers, output="neural_cache"), TASK)
    with pytest.raises(UserError, match="bigrams: has 64 tokens, the model knows 8"):
        probe_associations(make_model(layers), Bigrams())
    chained = Bigrams(tokens=4, triggers=3, concentration=0.01, world_seed=297)
    with pytest.raises(UserError, match="every token that the chain visits is a trigger"):
        probe_associations(make_model(layers), chained, length=8, rows=1)
    with pytest.raises(UserError, match="rows: must be at least 1, got 0"):
        probe_associations(make_model(layers), TASK, rows=0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
        )
    )
    with pytest.raises(UserError, match="got a LlamaForCausalLM"):
        probe_associations(llama, TASK)


def test_the_command(tmp_path, capsys) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    ideal_induction_head().save_pretrained(run)
    words = ["--model", str(run), "--output", str(out), "--length", "64", "--rows", "4"]
    assert main(words) == 2
    assert "has no config.yaml with a source of type bigrams" in capsys.readouterr().err
    options = {"tokens": TOKENS, "triggers": 2, "concentration": 1.0}
    source = {"type": "bigrams", "lengths": [8, 64], **options}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": [source]}}))
    assert main([*words, "--options", "{tokens: x}"]) == 2
    assert "--options.tokens: needs int, got 'x'" in capsys.readouterr().err
    assert main(words) == 0
    table = capsys.readouterr().out
    assert table == (out / "associative.md").read_text()
    assert "| 1 | 0 |" in table
    assert "| 100.0 | 1.00 | 100.0 | 100.0 |\n" in table
    found = json.loads((out / "associative.json").read_text())
    assert found["options"]["tokens"] == TOKENS
    assert found["heads"][0]["previous_token"] == 1
    assert found["heads"][1]["key_query"] == [1]
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 2
    assert "exists already; choose another folder" in capsys.readouterr().err
