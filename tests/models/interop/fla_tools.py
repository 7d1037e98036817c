"""Models of flash-linear-attention by their definition, one row and one token at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from memlm import MemLMForCausalLM
from tests.models.interop.tools import Tensors, relative_error


def attention_of(config: dict[str, Any], layer: int) -> dict[str, Any] | None:
    """The options of a layer's attention, None where it has another mixer."""
    given = config.get("attn")
    entries = [given] if isinstance(given, dict) else given or []
    return next((entry for entry in entries if layer in entry["layers"]), None)


class Reference:
    """A model in float64; its own mixer is `mix`."""

    def __init__(self, config: dict[str, Any], tensors: Tensors):
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.at = ""

    def linear(self, name: str, x: Tensor) -> Tensor:
        name = f"{self.at}{name}"
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["norm_eps"]).rsqrt()
        return x * scale * self.tensors[f"{self.at}{name}.weight"]

    def logits(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, vocab_size]."""
        hidden = self.tensors["model.embeddings.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            self.at = f"model.layers.{layer}."
            x = self.norm("attn_norm", hidden)
            attention = attention_of(self.config, layer)
            mixed = self.mix(x) if attention is None else self.attend(x, attention)
            hidden = hidden + mixed
            self.at = f"model.layers.{layer}."
            x = self.norm("mlp_norm", hidden)
            gated = F.silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)
            hidden = hidden + self.linear("mlp.down_proj", gated)
        self.at = ""
        hidden = self.norm("model.norm", hidden)
        tied = self.config["tie_word_embeddings"]
        head = self.tensors["model.embeddings.weight" if tied else "lm_head.weight"]
        return hidden @ head.T

    def mix(self, x: Tensor) -> Tensor:
        """The mixer, [tokens, hidden_size]; the names of its tensors start with `self.at`."""
        raise NotImplementedError

    def rotated(self, x: Tensor, theta: float) -> Tensor:
        """Rotary positions on [tokens, heads, channels]."""
        size = x.shape[-1]
        position = torch.arange(len(x), dtype=torch.float64)
        frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        turn = torch.polar(torch.ones(()).double(), position[:, None] * frequency)[:, None]
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def attend(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The attention of a hybrid model."""
        self.at += "attn."
        heads = options["num_heads"]
        size = self.config["hidden_size"] // heads
        q, k, v = (self.linear(f"{part}_proj", x).unflatten(-1, (-1, size)) for part in "qkv")
        q, k = (self.rotated(part, options.get("rope_theta", 1e4)) for part in (q, k))
        groups = heads // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
        position = torch.arange(len(x))
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (options.get("window_size") or len(x)))
        read = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.linear("o_proj", torch.einsum("hqk,khd->qhd", read, v).flatten(-2))


def save(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """Write a model's folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def check_logits(folder: Path, reference: Reference) -> None:
    """A folder loads, and its logits are those of the definition, also beside padding."""
    model = MemLMForCausalLM.from_pretrained(folder)
    ids = torch.randint(50, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = model(ids, attention_mask=mask).logits[mask == 1]
    rows = [row[own == 1] for row, own in zip(ids, mask, strict=True)]
    expected = torch.cat([reference.logits(row) for row in rows])
    assert relative_error(found, expected) <= 2e-5
