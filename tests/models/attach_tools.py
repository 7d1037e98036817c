"""Tiny models of transformers with memories attached."""

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from memlm import attach_memory
from tests.memory.law_tools import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
MEMORIES = {
    "knn_cache": {"capacity": 12, "segment": 4, "key_size": 8, "top_k": 3, "num_heads": 2},
    "gated_delta": {"num_heads": 2, "head_dim": 8},
    "titans": {"num_heads": 2, "head_dim": 8, "expansion": 2, "chunk_size": 4},
}
PRODUCT_KEY = {"num_keys": 6, "num_heads": 2, "top_k": 3}


def base_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model."""
    if family == "llama":
        return LlamaConfig(**GROUPED)
    if family == "mistral":
        return MistralConfig(**GROUPED, sliding_window=7)
    if family == "qwen3":
        return Qwen3Config(**GROUPED, head_dim=16)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=7, layer_types=kinds)
    if family == "gpt2":
        return GPT2Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)


FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt2", "opt")


def base_model(family: str, **options: Any) -> PreTrainedModel:
    """A tiny model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base_config(family), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """Its memory as after some training: the gates open, no weight at its start value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for branch in model.memory.layers.values():
            branch.gate.uniform_(0.5, 1.5)
    return model


@functools.lru_cache(maxsize=4)
def attached(family: str, memory: str, window: int | None = None, share: str | None = None):
    """A tiny model with a memory on two of its layers that acts; tests that change it copy it."""
    spec = {"type": memory, **MEMORIES[memory], "share": share}
    config = {"memory": spec, "layers": [0, 2], "window": window}
    return trained(attach_memory(base_model(family), config))
