"""Interchangeable memories. Importing this package fills the table of memories."""

from memlm.memory.base import (
    CallContext,
    MemoryConfig,
    MemoryModule,
    MemoryState,
    SequenceLayout,
    memory_class,
    memory_config,
    memory_names,
    register,
)
from memlm.memory.gated_delta import GatedDelta, GatedDeltaConfig
from memlm.memory.knn_cache import KnnCache, KnnCacheConfig
from memlm.memory.knn_lm import KnnLM, KnnLMConfig
from memlm.memory.lact import LaCT, LaCTConfig
from memlm.memory.linear_attention import LinearAttention, LinearAttentionConfig
from memlm.memory.memorizing_attention import MemorizingAttention, MemorizingAttentionConfig
from memlm.memory.min_gru import MinGRU, MinGRUConfig
from memlm.memory.min_lstm import MinLSTM, MinLSTMConfig
from memlm.memory.neural_cache import NeuralCache, NeuralCacheConfig
from memlm.memory.output_memory import OutputMemory, OutputMemoryConfig, output_memory_names
from memlm.memory.product_key import ProductKey, ProductKeyConfig
from memlm.memory.retention import Retention, RetentionConfig
from memlm.memory.segment_store import SegmentStore
from memlm.memory.titans import Titans, TitansConfig
from memlm.memory.usage import SlotUsage, UsageStatistics, record_usage
from memlm.memory.value_table import ValueTable, zeroed_values

__all__ = [
    "CallContext",
    "GatedDelta",
    "GatedDeltaConfig",
    "KnnCache",
    "KnnCacheConfig",
    "KnnLM",
    "KnnLMConfig",
    "LaCT",
    "LaCTConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "MemorizingAttention",
    "MemorizingAttentionConfig",
    "MemoryConfig",
    "MemoryModule",
    "MemoryState",
    "MinGRU",
    "MinGRUConfig",
    "MinLSTM",
    "MinLSTMConfig",
    "NeuralCache",
    "NeuralCacheConfig",
    "OutputMemory",
    "OutputMemoryConfig",
    "ProductKey",
    "ProductKeyConfig",
    "Retention",
    "RetentionConfig",
    "SegmentStore",
    "SequenceLayout",
    "SlotUsage",
    "Titans",
    "TitansConfig",
    "UsageStatistics",
    "ValueTable",
    "memory_class",
    "memory_config",
    "memory_names",
    "output_memory_names",
    "record_usage",
    "register",
    "zeroed_values",
]
