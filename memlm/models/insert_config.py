"""What `insert_memory` can be told."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.errors import UserError
from memlm.layers.attention_weights import AttentionWeights
from memlm.memory import MemoryConfig, memory_config
from memlm.models.attach_config import choose_layers
from memlm.specification import build_config


@strict
@dataclasses.dataclass(kw_only=True)
class InsertConfig:
    """New memories in the blocks of a model.

    Attributes:
        memory: `{type: NAME, ...}` as in `layers` of a MemLMConfig. Its `gate` is 0.0 unless given,
            so that the model's outputs are exactly kept until the memory is trained.
        layers: blocks that get one, from 0; None = the upper quarter, at least one.
        window: tokens that attention sees, itself included, in every block; None = as in the model.
            Where no attention sees everything, text may be longer than max_position_embeddings.
        freeze_base: in a run, train the new memories alone.
    """

    memory: dict[str, Any]
    layers: list[int] | None = None
    window: int | None = None
    freeze_base: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "insert") -> "InsertConfig":
        """A config from plain values, checked strictly.

        Raises:
            UserError: for an unknown key (with the nearest name), a wrong value or no mapping.
        """
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where}: expected a mapping such as {{'memory': NAME}}, got {values!r}"
            )
        values = {"memory": None, **values}
        memory = values["memory"]
        if isinstance(memory, str):
            memory = {"type": memory}
        if not isinstance(memory, Mapping) or not isinstance(memory.get("type"), str):
            raise UserError(
                f"{where}.memory: expected a name or a mapping with `type: NAME`, got {memory!r}"
            )
        config = build_config(cls, values | {"memory": {"gate": 0.0, **memory}}, where)
        config.build_memory(where)
        if config.window is not None and config.window < 1:
            raise UserError(f"{where}.window is {config.window}, it must be at least 1")
        return config

    def build_memory(self, where: str = "insert") -> MemoryConfig:
        """The memory's own config."""
        return memory_config(self.memory, f"{where}.memory")

    def chosen_layers(self, count: int, where: str = "insert") -> list[int]:
        """The blocks that get a memory in a model of `count` blocks, from bottom to top.

        Raises:
            UserError: for a block that does not exist or is named twice, or none at all.
        """
        return choose_layers(self.layers, count, where)

    def entry(self, weights: AttentionWeights | None) -> dict[str, Any]:
        """The memory's entry in `layers` of a MemLMConfig.

        Args:
            weights: of an attention that it starts from: sizes left open become its own.
        """
        if weights is None:
            return dict(self.memory)
        config = self.build_memory()
        fitted = config.for_attention(weights)
        names = [field.name for field in dataclasses.fields(config)]
        sizes = {n: getattr(fitted, n) for n in names if getattr(fitted, n) != getattr(config, n)}
        return self.memory | sizes
