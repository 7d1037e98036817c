"""RetNet of flash-linear-attention: its layout, and what it computes, token by token."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import MemLMConfig
from memlm.errors import UserError
from memlm.models.convert import main
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.fla_tools import Reference, check_logits, save
from tests.models.interop.tools import Tensors, same_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["RetNetForCausalLM"],
    "attn": None,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "retnet",
    "norm_eps": 1e-5,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "vocab_size": 50,
}


def make_tensors() -> Tensors:
    """Random weights by the names and in the shapes that the library writes."""
    width, inner, vocab, key = 32, 40, 50, 16
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for layer in range(2):
        own = f"model.layers.{layer}"
        shapes |= {
            f"{own}.attn_norm.weight": (width,),
            f"{own}.attn.q_proj.weight": (key, width),
            f"{own}.attn.k_proj.weight": (key, width),
            f"{own}.attn.v_proj.weight": (width, width),
            f"{own}.attn.g_proj.weight": (width, width),
            f"{own}.attn.o_proj.weight": (width, width),
            f"{own}.attn.g_norm_swish_gate.weight": (width // 2,),
            f"{own}.mlp_norm.weight": (width,),
            f"{own}.mlp.gate_proj.weight": (inner, width),
            f"{own}.mlp.up_proj.weight": (inner, width),
            f"{own}.mlp.down_proj.weight": (width, inner),
        }
    return {name: 0.4 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}


class RetentionReference(Reference):
    """A matrix per head that keeps 1 - 2^(-5 - head) of itself per token."""

    def mix(self, x: Tensor) -> Tensor:
        self.at += "attn."
        heads = self.config["num_heads"]
        q, k, v = (self.linear(f"{part}_proj", x).unflatten(-1, (heads, -1)) for part in "qkv")
        q, k = self.rotated(q, 1e4), self.rotated(k, 1e4)
        kept = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
        state = torch.zeros(heads, k.shape[-1], v.shape[-1], dtype=torch.float64)
        read = []
        for t in range(len(x)):
            state = state * kept[:, None, None] + k[t, :, :, None] * v[t, :, None]
            read.append(torch.einsum("hkv,hk->hv", state, q[t]) * k.shape[-1] ** -0.5)
        output = self.norm("g_norm_swish_gate", torch.stack(read))
        output = output * F.silu(self.linear("g_proj", x)).view_as(output)
        return self.linear("o_proj", output.flatten(-2))


def test_the_same_logits_and_every_tensor_back_bit_by_bit(tmp_path):
    tensors = make_tensors()
    theirs = save(tmp_path / "theirs", CONFIG, tensors)
    check_logits(theirs, RetentionReference(CONFIG, tensors))

    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main([str(theirs), ours]) == 0
    assert main([ours, str(back), "--to", "retnet"]) == 0
    assert same_tensors(back, theirs)
    read = ARCHITECTURES["retnet"].read_config
    assert read(json.loads((back / "config.json").read_text())) == read(CONFIG)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"feature_map": "relu"}, "feature_map 'relu'"),
        ({"num_kv_heads": 1}, "num_kv_heads 1"),
        ({"use_short_conv": True}, "use_short_conv True"),
        ({"use_output_gate": False}, "use_output_gate False"),
        ({"elementwise_affine": False}, "elementwise_affine False"),
        ({"expand_k": 0.0}, "expand_k 0.0; 0 channels"),
        ({"num_heads": 3}, "16 channels cannot be those of 3 heads"),
        ({"num_heads": 0}, "num_heads 0"),
    ],
)
def test_what_would_change_the_computation_is_refused(values, named):
    with pytest.raises(UserError, match=named):
        ARCHITECTURES["retnet"].read_config(CONFIG | values)


def test_other_decays_have_no_place_there():
    layers = [{"mixer": {"type": "retention", "first_exponent": 4.0}, "ffn": "swiglu"}]
    with pytest.raises(UserError, match=r"layer 0.mixer: first_exponent 4.0 has no place"):
        ARCHITECTURES["retnet"].write_config(MemLMConfig(hidden_size=64, layers=layers))
