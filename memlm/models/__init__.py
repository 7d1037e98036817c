"""The model, its configuration, and the cache that carries its states in generation."""

from memlm.models.attach import attach_memory
from memlm.models.attach_config import AttachConfig
from memlm.models.cache import MemLMCache
from memlm.models.configuration import MemLMConfig
from memlm.models.insert import insert_memory
from memlm.models.insert_config import InsertConfig
from memlm.models.load_attached import load_attached, load_memory
from memlm.models.modeling import MemLMForCausalLM, MemLMModel, MemLMOutput

__all__ = [
    "AttachConfig",
    "InsertConfig",
    "MemLMCache",
    "MemLMConfig",
    "MemLMForCausalLM",
    "MemLMModel",
    "MemLMOutput",
    "attach_memory",
    "insert_memory",
    "load_attached",
    "load_memory",
]
