"""What `attach_memory` can be told."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict

from memlm.errors import UserError
from memlm.memory import MemoryConfig, memory_config
from memlm.memory.output_memory import output_memory_config
from memlm.models.lora import LoraOptions
from memlm.specification import build_config


@strict
@dataclasses.dataclass(kw_only=True)
class AttachConfig:
    """A memory for a pretrained model.

    Attributes:
        memory: `{type: NAME, ...}` as in `layers` of a MemLMConfig. Its `gate` is 0.0 unless given,
            so that the model's outputs are exactly kept until the memory is trained. None = no
            layer has one, but there is an output memory.
        output: an output memory behind the head, as in a MemLMConfig; None = none.
        layers: decoder layers that get one, from 0; None = the upper quarter, at least one.
        window: tokens that attention sees, itself included, in every layer; None = as in the model.
            With a window text may be longer than the model's positions, where these are rotary.
        lora: low-rank adapters that are trained with the memory, see `LoraOptions`; {} = as in
            Neurocache. They stay on where the memory is switched off.
    """

    memory: dict[str, Any] | None = None
    output: dict[str, Any] | str | None = None
    layers: list[int] | None = None
    window: int | None = None
    lora: dict[str, Any] | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "attach") -> "AttachConfig":
        """A config from plain values, checked strictly.

        Raises:
            UserError: for an unknown key (with the nearest name), a wrong value or no mapping.
        """
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where}: expected a mapping such as {{'memory': NAME}}, got {values!r}"
            )
        values = dict(values)
        memory = values.get("memory")
        if isinstance(memory, str):
            values["memory"] = {"type": memory}
        elif memory is None and values.get("output") is not None:
            if values.get("layers") is not None:
                raise UserError(f"{where}.layers: only a memory has layers, an output memory none")
        elif not isinstance(memory, Mapping) or not isinstance(memory.get("type"), str):
            raise UserError(
                f"{where}.memory: expected a name or a mapping with `type: NAME`, got {memory!r}"
            )
        else:
            values["memory"] = dict(memory)
        config = build_config(cls, values, where)
        if config.memory is not None:
            config.build_memory(where)
        if config.output is not None:
            output_memory_config(config.output, f"{where}.output")
        config.build_lora(where)
        if config.window is not None and config.window < 1:
            raise UserError(f"{where}.window is {config.window}, it must be at least 1")
        return config

    def build_memory(self, where: str = "attach") -> MemoryConfig:
        """The memory's own config."""
        return memory_config({"gate": 0.0, **self.memory}, f"{where}.memory")

    def build_lora(self, where: str = "attach") -> LoraOptions | None:
        """The options of the adapters."""
        if self.lora is None:
            return None
        return build_config(LoraOptions, self.lora, f"{where}.lora")

    def lora_layers(self, count: int, where: str = "attach") -> list[int]:
        """The layers that get adapters in a model of `count` layers.

        Raises:
            UserError: for a layer that does not exist, or where no layer has a memory and none is
                named.
        """
        options = self.build_lora(where)
        if options is None:
            return []
        if options.layers is not None:
            options.check_layers(count, f"{where}.lora")
            return sorted(set(options.layers))
        if self.memory is None:
            raise UserError(f"{where}.lora.layers: no layer has a memory; name the layers")
        return self.chosen_layers(count, where)

    def chosen_layers(self, count: int, where: str = "attach") -> list[int]:
        """The layers that get a memory in a model of `count` layers, from bottom to top.

        Raises:
            UserError: for a layer that does not exist or is named twice, or none at all.
        """
        if self.memory is None:
            return []
        return choose_layers(self.layers, count, where)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `from_mapping` accepts."""
        return dataclasses.asdict(self)


def choose_layers(layers: list[int] | None, count: int, where: str) -> list[int]:
    """The layers of a model of `count` layers that get a memory, from bottom to top.

    Args:
        layers: their numbers from 0; None = the upper quarter, at least one.
        count: layers of the model.
        where: the section that names them, for errors.

    Raises:
        UserError: for a layer that does not exist or is named twice, or none at all.
    """
    if layers is None:
        return list(range(count - max(1, count // 4), count))
    for index in layers:
        if not 0 <= index < count:
            raise UserError(
                f"{where}.layers: there is no layer {index}; the model has 0 to {count - 1}"
            )
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"{where}.layers: name at least one layer, and each of them once")
    return sorted(layers)
