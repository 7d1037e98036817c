"""What a conversion will do: the other side's config and its tensors, before any is read."""

import dataclasses
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig

from memlm.errors import UserError, nearest
from memlm.models.configuration import MemLMConfig
from memlm.models.interop import ARCHITECTURES
from memlm.models.interop.architecture import Architecture
from memlm.models.interop.checkpoint import Checkpoint
from memlm.models.interop.conversion import Conversion
from memlm.models.modeling import MemLMForCausalLM


@dataclasses.dataclass
class Plan:
    """What comes out.

    Attributes:
        config: of the model.
        conversion: its tensors.
        generation: how it generates.
    """

    config: MemLMConfig | dict[str, Any]
    conversion: Conversion
    generation: GenerationConfig


def is_foreign(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of another library's model."""
    return config.get("model_type") not in (None, MemLMConfig.model_type)


def from_theirs(checkpoint: Checkpoint, **overrides: Any) -> Plan:
    """A checkpoint of another architecture as a model of ours; overrides: of its `MemLMConfig`.

    Raises:
        UserError: for an architecture without a map, or what this library cannot compute.
    """
    architecture = _find(checkpoint.config["model_type"], checkpoint.source)
    theirs = checkpoint.config
    if architecture.observe is not None:
        theirs = architecture.observe(theirs, checkpoint.tensors)
    try:
        values = architecture.read_config(theirs) | overrides
        config = MemLMConfig.from_mapping(values)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error}") from error
    config.dtype = _dtype(checkpoint)
    config.architectures = [MemLMForCausalLM.__name__]
    rules = architecture.rules(theirs)
    conversion = Conversion(checkpoint, rules, our_tensors(config), to_ours=True)
    return Plan(config, conversion, _generation(checkpoint))


def to_theirs(checkpoint: Checkpoint, model_type: str) -> Plan:
    """A checkpoint of ours as a model of another architecture.

    Raises:
        UserError: for an architecture that is not written, or one that cannot hold the model.
    """
    architecture = _find(model_type, checkpoint.source, writing=True)
    try:
        config = MemLMConfig.from_dict(dict(checkpoint.config))
        theirs = architecture.write_config(config)
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint.source}: config.json is not valid ({reason})") from error
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error}") from error
    theirs["dtype"] = str(_dtype(checkpoint)).removeprefix("torch.")
    rules = architecture.rules(theirs)
    conversion = Conversion(checkpoint, rules, our_tensors(config), to_ours=False)
    return Plan(theirs, conversion, _generation(checkpoint))


def our_tensors(config: MemLMConfig) -> dict[str, Tensor]:
    """The tensors of a model of ours on disk, without numbers: a tied head is not written."""
    with torch.device("meta"):
        model = MemLMForCausalLM(config)
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _find(model_type: str, source: str, writing: bool = False) -> Architecture:
    known = {
        name: architecture
        for name, architecture in ARCHITECTURES.items()
        if not writing or architecture.write_config is not None
    }
    if model_type in known:
        return known[model_type]
    names = ", ".join(sorted(known))
    if writing:
        raise UserError(
            f"{source}: models are not written as {model_type!r}{nearest(model_type, known)} "
            f"(valid: {names})"
        )
    raise UserError(
        f"{source}: a {model_type} model does not become one of memlm (those that do: {names}); "
        "memlm.attach_memory gives a memory to any causal language model of transformers as it is"
    )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """As config.json says, or that of the first floating-point tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
        return getattr(torch, named)
    floating = (t.dtype for t in checkpoint.tensors.values() if t.is_floating_point())
    return next(floating, torch.float32)


def _generation(checkpoint: Checkpoint) -> GenerationConfig:
    """Its generation_config.json, or what its config.json says of generation."""
    generation = checkpoint.generation()
    if generation is not None:
        return generation
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    values = {key: value for key, value in checkpoint.config.items() if key in known}
    return GenerationConfig.from_dict(values)
