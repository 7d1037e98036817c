"""Options that a config does not name leave the model as it is without them."""

import torch

from memlm import MemLMConfig, MemLMForCausalLM

ATTENTION = {"type": "attention", "num_heads": 2, "qk_norm": True, "conv_size": 3}
DELTA = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
SPELLED_OUT = {
    "attention": {
        "rope_fraction": 1.0,
        "rope_scaling": None,
        "qkv_bias": False,
        "output_bias": False,
        "output_gate": False,
    },
    "gated_delta": {"conv_bias": False, "gate_activation": "silu", "norm_eps": None},
}
ATTENTION_NAMES = [
    "mixer.module.q_proj.weight",
    "mixer.module.k_proj.weight",
    "mixer.module.v_proj.weight",
    "mixer.module.o_proj.weight",
    "mixer.module.q_norm.weight",
    "mixer.module.k_norm.weight",
    "mixer.module.convolution.weight",
    "mixer.norm.weight",
]
DELTA_NAMES = [
    "mixer.module.A_log",
    "mixer.module.dt_bias",
    "mixer.module.q_proj.weight",
    "mixer.module.k_proj.weight",
    "mixer.module.v_proj.weight",
    "mixer.module.conv1d.weight",
    "mixer.module.a_proj.weight",
    "mixer.module.b_proj.weight",
    "mixer.module.g_proj.weight",
    "mixer.module.o_norm.weight",
    "mixer.module.o_proj.weight",
    "mixer.norm.weight",
]


def build(mixers, **options):
    """With the same start values whenever the weights are the same ones."""
    torch.manual_seed(1)
    layers = [{"mixer": mixer} for mixer in mixers]
    return MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers, **options))


def test_same_weights_and_logits():
    plain = build([ATTENTION, DELTA])
    expected = ["model.embed_tokens.weight"]
    for i, names in enumerate((ATTENTION_NAMES, DELTA_NAMES)):
        expected += [f"model.layers.{i}.{name}" for name in names]
    expected += ["model.norm.weight", "lm_head.weight"]
    assert list(plain.state_dict()) == expected

    spelled_out = [{**mixer, **SPELLED_OUT[mixer["type"]]} for mixer in (ATTENTION, DELTA)]
    same = build(spelled_out, zero_centered_norm=False)
    ids = torch.randint(plain.config.vocab_size, (2, 11))
    with torch.no_grad():
        assert torch.equal(same(ids).logits, plain(ids).logits)
    assert (plain.model.norm.weight == 1).all()
