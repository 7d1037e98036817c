"""Low-rank adapters (LoRA) on the layers of a pretrained model, made by peft.

After Hu et al. 2022, "LoRA", arXiv 2106.09685. Neurocache (Safaya and Yuret 2024, arXiv 2407.02486)
trains its memories together with adapters on the feed-forward parts of the same layers; the default
sizes are its.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.pytorch_utils import Conv1D

from memlm.errors import UserError, nearest

# Feed-forward projections by the names that decoders of transformers give them.
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "mlp.c_fc", "mlp.c_proj")


@strict
@dataclasses.dataclass(kw_only=True)
class LoraOptions:
    """The adapters of a model.

    Attributes:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: probability with which a channel of an adapter's input is dropped in training.
        target_modules: linear layers that get one, by the end of their name inside a decoder
            layer: `q_proj`, `mlp.c_proj`; None = those of the feed-forward part.
        layers: decoder layers that get them; None = those with a memory.
    """

    r: int = 32
    alpha: float = 64.0
    dropout: float = 0.1
    target_modules: list[str] | None = None
    layers: list[int] | None = None

    def validate_values(self) -> None:
        """Called by `strict`: raise UserError for a value that cannot work."""
        if self.r < 1:
            raise UserError(f"r is {self.r}, it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, it must be in [0, 1)")
        for name in ("target_modules", "layers"):
            if getattr(self, name) == []:
                raise UserError(f"{name} is empty; name at least one, or leave it out")

    def check_layers(self, count: int, where: str = "lora") -> None:
        """Raise UserError for a layer that a model of `count` layers does not have."""
        for index in self.layers or []:
            if not 0 <= index < count:
                raise UserError(
                    f"{where}.layers: there is no layer {index}; the model has 0 to {count - 1}"
                )


def add_lora(layers: Mapping[int, nn.Module], options: LoraOptions) -> None:
    """Put adapters into decoder layers; their output is zero until they are trained.

    The weights of these layers no longer ask for gradients, only the adapters do. Nothing is
    changed when an error is raised.

    Args:
        layers: the decoder layers that get them, by their number.
        options: sizes and the linear layers meant.

    Raises:
        UserError: without peft, or for a name that no linear layer has.
    """
    peft = _peft()
    for index, layer in layers.items():
        if any(isinstance(module, peft.tuners.lora.LoraLayer) for module in layer.modules()):
            raise UserError(f"lora: layer {index} has adapters already; merge or unload them first")
    names = {index: _targets(layer, options, index) for index, layer in layers.items()}
    for index, layer in layers.items():
        config = peft.LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            # A pattern: as a list of names they would match the ends of other names too.
            target_modules="|".join(map(re.escape, names[index])),
            # Of GPT-2's layers, whose weights are [in, out].
            fan_in_fan_out=any(isinstance(layer.get_submodule(n), Conv1D) for n in names[index]),
        )
        peft.inject_adapter_in_model(config, layer)
        layer.train(layer.training)  # new modules are in training mode
        del layer.peft_config  # transformers would take it for a loaded adapter of the model


def remove_lora(layers: Iterable[nn.Module]) -> None:
    """Take the adapters out again; the linear layers are the objects that were there before."""
    for layer in layers:
        adapter = _peft().tuners.lora.LoraLayer
        adapted = {name: m for name, m in layer.named_modules() if isinstance(m, adapter)}
        for name, module in adapted.items():
            layer.set_submodule(name, module.get_base_layer())


def is_lora_name(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def _targets(layer: nn.Module, options: LoraOptions, index: int) -> list[str]:
    """The names, in the layer, of the linear layers meant."""
    linears = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]

    def ending(wanted: str) -> list[str]:
        return [name for name in linears if f".{name}".endswith(f".{wanted}")]

    if options.target_modules is None:
        found = [name for wanted in FEED_FORWARD for name in ending(wanted)]
        if not found:
            raise UserError(
                "lora.target_modules: the feed-forward part is not found by its usual names; name "
                f"some of the linear layers of layer {index}: {', '.join(linears)}"
            )
        return found
    for wanted in options.target_modules:
        if not ending(wanted):
            raise UserError(
                f"lora.target_modules: layer {index} has no linear layer {wanted!r}"
                f"{nearest(wanted, linears)} (it has {', '.join(linears)})"
            )
    return list(dict.fromkeys(n for wanted in options.target_modules for n in ending(wanted)))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "lora needs peft, which is not installed: pip install memlm[peft]"
        ) from error
    return peft
