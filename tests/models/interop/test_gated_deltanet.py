"""Gated DeltaNet of flash-linear-attention: its layout, and what it computes, token by token."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.models.convert import main
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.fla_tools import Reference, attention_of, check_logits, save
from tests.models.interop.tools import Tensors, read_tensors, same_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_norm": True,
    "head_dim": 8,
    "hidden_act": "swish",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "gated_deltanet",
    "norm_eps": 1e-5,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 50,
}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "grouped values": {
        "num_v_heads": 4,
        "expand_v": 1.5,
        "allow_neg_eigval": True,
        "output_gate_activation": "sigmoid",
        "tie_word_embeddings": True,
    },
    "neither gate nor convolution": {"use_gate": False, "use_short_conv": False, "expand_v": 1},
    "hybrid": {"attn": {"layers": [1], "window_size": 5, **ATTENTION}, "use_gate": True},
    "two kinds of attention": {
        "num_hidden_layers": 3,
        "attn": [
            {"layers": [0], "window_size": 5, **ATTENTION},
            {"layers": [2], "num_heads": 3},
        ],
    },
}


def make_tensors(config: dict[str, Any], conv_bias: bool = False) -> Tensors:
    """Random weights by the names and in the shapes that the library writes."""
    width, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, key = config["num_heads"], config["head_dim"]
    value_heads = config.get("num_v_heads") or heads
    value = int(key * config.get("expand_v", 2.0))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        shapes |= {
            f"{own}.attn_norm.weight": (width,),
            f"{own}.mlp_norm.weight": (width,),
            f"{own}.mlp.gate_proj.weight": (inner, width),
            f"{own}.mlp.up_proj.weight": (inner, width),
            f"{own}.mlp.down_proj.weight": (width, inner),
        }
        own += ".attn"
        attention = attention_of(config, layer)
        if attention is not None:
            kept = width * attention.get("num_kv_heads", attention["num_heads"])
            kept //= attention["num_heads"]
            sizes = {"q": width, "k": kept, "v": kept}
            shapes |= {f"{own}.{part}_proj.weight": (n, width) for part, n in sizes.items()}
            shapes[f"{own}.o_proj.weight"] = (width, width)
            if attention.get("qkv_bias"):
                shapes |= {f"{own}.{part}_proj.bias": (n,) for part, n in sizes.items()}
            continue
        sizes = {"q": heads * key, "k": heads * key, "v": value_heads * value}
        shapes |= {f"{own}.{part}_proj.weight": (n, width) for part, n in sizes.items()}
        shapes |= {
            f"{own}.A_log": (value_heads,),
            f"{own}.dt_bias": (value_heads,),
            f"{own}.a_proj.weight": (value_heads, width),
            f"{own}.b_proj.weight": (value_heads, width),
            f"{own}.o_norm.weight": (value,),
            f"{own}.o_proj.weight": (width, value_heads * value),
        }
        if config.get("use_gate", True):
            shapes[f"{own}.g_proj.weight"] = (value_heads * value, width)
        if config.get("use_short_conv", True):
            shapes |= {f"{own}.{part}_conv1d.weight": (n, 1, 4) for part, n in sizes.items()}
            if conv_bias:
                shapes |= {f"{own}.{part}_conv1d.bias": (n,) for part, n in sizes.items()}
    return {name: 0.4 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}


class DeltaReference(Reference):
    """The gated delta rule."""

    def convolved(self, part: str, x: Tensor) -> Tensor:
        x = self.linear(f"{part}_proj", x)
        if self.config.get("use_short_conv", True):
            name = f"{self.at}{part}_conv1d"
            bias = self.tensors.get(f"{name}.bias")
            padded = F.pad(x.T, (3, 0))
            x = F.conv1d(padded, self.tensors[f"{name}.weight"], bias, groups=len(padded)).T
        return F.silu(x)

    def mix(self, x: Tensor) -> Tensor:
        config = self.config
        self.at += "attn."
        heads, key = config["num_heads"], config["head_dim"]
        value_heads = config.get("num_v_heads") or heads
        q, k, v = (self.convolved(part, x) for part in "qkv")
        q, k = (
            F.normalize(part.unflatten(-1, (heads, key)), dim=-1).repeat_interleave(
                value_heads // heads, 1
            )
            for part in (q, k)
        )
        v = v.unflatten(-1, (value_heads, -1))
        rate = F.softplus(self.linear("a_proj", x) + self.tensors[f"{self.at}dt_bias"])
        decay = (-self.tensors[f"{self.at}A_log"].exp() * rate).exp()
        beta = self.linear("b_proj", x).sigmoid() * (1 + config.get("allow_neg_eigval", False))
        state = torch.zeros(value_heads, key, v.shape[-1], dtype=torch.float64)
        read = []
        for t in range(len(x)):
            state = state * decay[t, :, None, None]
            known = torch.einsum("hkv,hk->hv", state, k[t])
            change = beta[t, :, None] * (v[t] - known)
            state = state + k[t, :, :, None] * change[:, None]
            read.append(torch.einsum("hkv,hk->hv", state, q[t]) * key**-0.5)
        output = self.norm("o_norm", torch.stack(read))
        if config.get("use_gate", True):
            gate = self.linear("g_proj", x).view_as(output)
            sigmoid = config.get("output_gate_activation") == "sigmoid"
            output = output * (gate.sigmoid() if sigmoid else F.silu(gate))
        return self.linear("o_proj", output.flatten(-2))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_same_logits_and_every_tensor_back_bit_by_bit(options, tmp_path):
    config = CONFIG | options
    tensors = make_tensors(config)
    theirs = save(tmp_path / "theirs", config, tensors)
    check_logits(theirs, DeltaReference(config, tensors))

    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main([str(theirs), ours]) == 0
    assert main([ours, str(back), "--to", "gated_deltanet"]) == 0
    assert same_tensors(back, theirs)
    written = json.loads((back / "config.json").read_text())
    read = ARCHITECTURES["gated_deltanet"].read_config
    assert read(written) == read(config)


@torch.no_grad()
def test_64_greedy_tokens_are_those_of_the_definition(tmp_path):
    config = CONFIG | CASES["hybrid"]
    tensors = make_tensors(config)
    reference = DeltaReference(config, tensors)
    ids = torch.randint(50, (9,))
    model = MemLMForCausalLM.from_pretrained(save(tmp_path / "theirs", config, tensors))
    found = model.generate(ids[None], max_new_tokens=64, do_sample=False, eos_token_id=None)
    for _ in range(64):
        ids = torch.cat([ids, reference.logits(ids)[-1:].argmax(-1)])
    assert torch.equal(found[0], ids)


def test_biases_of_the_convolutions_are_found_by_their_tensors(tmp_path):
    tensors = make_tensors(CONFIG, conv_bias=True)
    check_logits(save(tmp_path / "theirs", CONFIG, tensors), DeltaReference(CONFIG, tensors))


def test_files_of_older_versions(tmp_path):
    """The gate and what it gates in one matrix, and a parameter that nothing reads."""
    tensors = make_tensors(CONFIG)
    older = dict(tensors)
    for layer in range(2):
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        older[names[0]] = torch.cat([older.pop(name) for name in names])
        older[f"model.layers.{layer}.attn.D"] = torch.ones(2)
    folder = save(tmp_path / "theirs", CONFIG, older)
    check_logits(folder, DeltaReference(CONFIG, tensors))

    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main([str(folder), ours]) == 0
    assert main([ours, str(back), "--to", "gated_deltanet"]) == 0
    found = read_tensors(back)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def read(**values: Any) -> MemLMConfig:
    config = {"model_type": "gated_deltanet", "hidden_size": 32, **values}
    return MemLMConfig.from_mapping(ARCHITECTURES["gated_deltanet"].read_config(config))


def test_what_a_config_json_leaves_out_is_what_the_library_takes():
    config = read(num_heads=2, head_dim=8, eos_token_id=[5, 6])
    assert config.eos_token_id == 5
    assert config.num_hidden_layers == 21 and config.vocab_size == 32000
    assert config.intermediate_size == 256  # 2/3 of 4 times 32, up to a multiple of 256
    assert read(hidden_ratio=None, hidden_size=300).intermediate_size == 1024


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_act": "powlu"}, "hidden_act 'powlu'"),
        ({"attnres_block_size": 4}, "attnres_block_size 4"),
        ({"output_gate_activation": "tanh"}, "output_gate_activation 'tanh'"),
        ({"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}}, "qk_norm of it"),
        ({"attn": {"num_heads": 2}}, "a list of layers"),
        ({"attn": {"layers": [1], "num_heads": 0}}, "num_heads of at least 1"),
        ({"attn": {"layers": [21], "num_heads": 2}}, "there is no layer 21"),
        ({"attn": 3}, "it must be a mapping"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'; it must be int"),
        ({"expand_v": "2"}, "expand_v '2'; it must be int or float"),
        ({"num_heads": None}, "num_heads None; it must be int"),
        ({"eos_token_id": "end"}, "eos_token_id 'end'"),
        ({"norm_first": True}, "norm_first True"),
    ],
)
def test_what_would_change_the_computation_is_refused(values, named):
    with pytest.raises(UserError, match=named):
        read(**values)


def mixer(**options: Any) -> dict[str, Any]:
    return {"layers": [{"mixer": {"type": "gated_delta", **options}, "ffn": "swiglu"}]}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (mixer(decay=False), "layer 0.mixer: decay False"),
        (mixer(beta_bias=1.0), "layer 0.mixer: beta_bias 1.0"),
        (mixer(conv_bias=True), "layer 0.mixer: conv_bias True"),
        (mixer(norm_eps=1e-3), "layer 0.mixer: norm_eps 0.001 beside rms_norm_eps 1e-06"),
        ({"layers": [{"mixer": "attention", "ffn": "swiglu"}]}, "a model without gated_delta"),
        ({"layers": [{"mixer": "retention", "ffn": "swiglu"}]}, "layer 0.mixer: 'retention'"),
        (
            {
                "layers": [
                    *mixer()["layers"],
                    {"mixer": {"type": "attention", "qk_norm": True}, "ffn": "swiglu"},
                ]
            },
            "layer 1.mixer: qk_norm True",
        ),
    ],
)
def test_what_the_other_side_cannot_hold_is_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        ARCHITECTURES["gated_deltanet"].write_config(MemLMConfig(hidden_size=64, **values))
