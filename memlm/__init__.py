"""memlm: language models with interchangeable memories."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memlm.data.tokenizers import register_tokenizers
from memlm.errors import UserError
from memlm.models import (
    MemLMCache,
    MemLMConfig,
    MemLMForCausalLM,
    MemLMModel,
    attach_memory,
    insert_memory,
    load_attached,
    load_memory,
)

__version__ = "0.1.0"

AutoConfig.register(MemLMConfig.model_type, MemLMConfig, exist_ok=True)
AutoModel.register(MemLMConfig, MemLMModel, exist_ok=True)
AutoModelForCausalLM.register(MemLMConfig, MemLMForCausalLM, exist_ok=True)
register_tokenizers(MemLMConfig)

__all__ = [
    "MemLMCache",
    "MemLMConfig",
    "MemLMForCausalLM",
    "MemLMModel",
    "UserError",
    "attach_memory",
    "insert_memory",
    "load_attached",
    "load_memory",
]
