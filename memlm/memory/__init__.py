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
from memlm.memory.titans import Titans, TitansConfig

__all__ = [
    "CallContext",
    "MemoryConfig",
    "MemoryModule",
    "MemoryState",
    "SequenceLayout",
    "memory_class",
    "memory_config",
    "memory_names",
    "register",
]
