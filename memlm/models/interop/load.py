"""Models of other libraries as models of ours, in memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from memlm.errors import UserError
from memlm.models.configuration import MemLMConfig
from memlm.models.interop.checkpoint import Checkpoint
from memlm.models.interop.conversion import Conversion
from memlm.models.interop.plan import from_theirs, is_foreign

_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
# Values of a `MemLMConfig` that change nothing about the tensors.
_OVERRIDES = (
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "use_cache",
)
_NAME = "pretrained_model_name_or_path"
_UNSUPPORTED = ("variant", "gguf_file", "key_mapping", "state_dict")


def names_foreign(source: Any, options: Mapping[str, Any]) -> bool:
    """Whether arguments of `from_pretrained` name a model of another library, or its config."""
    config = options.get("config")
    places = [source]
    if isinstance(config, PreTrainedConfig):
        if is_foreign({"model_type": config.model_type}):
            return True
    elif config is not None:
        places.append(config)
    return any(_holds_foreign(place, options) for place in places if place is not None)


def _holds_foreign(place: Any, options: Mapping[str, Any]) -> bool:
    hub = {key: options[key] for key in _HUB if options.get(key) is not None}
    try:
        values, _ = PreTrainedConfig.get_config_dict(place, **hub)
    except OSError:  # transformers says what is wrong
        return False
    return is_foreign(values)


def load_foreign(load: Callable[..., Any], source: Any, options: Mapping[str, Any]) -> Any:
    """Load a model of another library as one of ours.

    Args:
        load: transformers' `from_pretrained` of our class.
        source: folder or Hub id.
        options: its keyword arguments; `use_safetensors=False` also reads pickled weights.

    Returns:
        What `load` returns.

    Raises:
        UserError: for a model without a map or that cannot be computed here, for files that are
            missing or damaged, and for options that only files of ours can have.
    """
    rest = {key: value for key, value in options.items() if key != _NAME}
    for key in _UNSUPPORTED:
        if rest.pop(key, None) is not None:
            raise UserError(
                f"from_pretrained: {key} is not known for models of other libraries, which are "
                f"read from {SAFE_WEIGHTS_NAME} or its parts"
            )
    if rest.pop("config", None) is not None:
        raise UserError(
            f"from_pretrained: {source} and config are not both of memlm; leave config out, it is "
            "read from there"
        )
    hub = {key: rest.pop(key) for key in _HUB if key in rest}
    hub = {key: value for key, value in hub.items() if value is not None}
    own = {field.name for field in dataclasses.fields(MemLMConfig)} - {"dtype"}
    overrides = {key: rest.pop(key) for key in list(rest) if key in own}
    for key in overrides:
        if key not in _OVERRIDES:
            raise UserError(f"from_pretrained: {key} follows from the config.json of {source}")
    checkpoint = Checkpoint(source, rest.get("use_safetensors") is False, **hub)
    plan = from_theirs(checkpoint, **overrides)
    plan.conversion.check()
    tensors = {name: LazyTensor(plan.conversion, name) for name in plan.conversion.targets}
    loaded = load(None, config=plan.config, state_dict=tensors, **rest)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if model.can_generate() and rest.get("generation_config") is None:
        model.generation_config = plan.generation
    model.config.name_or_path = model.name_or_path = str(source)
    return loaded


class LazyTensor:
    """A tensor of a conversion that is made when transformers asks for its numbers.

    It stands for a part of a safetensors file, of which transformers takes `part[...]`.
    """

    def __init__(self, conversion: Conversion, name: str):
        self.conversion = conversion
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self.conversion.read(self.name)[index]
