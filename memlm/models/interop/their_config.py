"""The config.json of another architecture, read value by value: none is left out unknowingly."""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from memlm.errors import UserError

# Of every config.json, and without a part in what a model computes.
_DESCRIPTIVE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "is_encoder_decoder",
    "is_llama_config",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
} | set(PreTrainedConfig.__dataclass_fields__)
# What a file was made with, and what belongs to its tokenizer.
_OF_TOOLS = ("unsloth_", "tokenizer_")
_GENERATION = set(GenerationConfig().to_dict())
MOST_LAYERS = 10_000
# What config classes of transformers raise for values that they do not check.
_MALFORMED = (TypeError, KeyError, AttributeError, ArithmeticError)
# Rotary positions, in the spellings of several years.
_ROPE = (
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)


class TheirConfig:
    """Values of a config.json, with the defaults of its own library where it is silent.

    A map takes every value that it understands, then calls `finish`.

    Args:
        values: the config.json.
        defaults: of the architecture; None = those of transformers' own config class of that
            model_type, which also brings older spellings into today's.

    Raises:
        UserError: for values that the config class refuses.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self.model_type = values["model_type"]
        self.given = dict(values)
        self.understood: set[str] = set()
        self.values = self.given
        depth = self.given.get("num_hidden_layers", 1)
        if isinstance(depth, int) and not 1 <= depth <= MOST_LAYERS:  # before lists are that long
            self.refuse("num_hidden_layers", f"it must be from 1 to {MOST_LAYERS}")
        if defaults is None:
            self.values = standardized(self.model_type, values)
        else:
            self.values = {**defaults, **values}
            self._check_types(defaults)

    def _check_types(self, defaults: Mapping[str, Any]) -> None:
        for key, default in defaults.items():
            # Of tokens there may be several; without a ratio another default holds.
            if default is None or key.endswith("_token_id") or key == "hidden_ratio":
                continue
            value = self.values[key]
            types = (int, float) if isinstance(default, float) else (type(default),)
            if type(value) not in types:
                self.refuse(key, f"it must be {' or '.join(kind.__name__ for kind in types)}")

    def take(self, key: str) -> Any:
        """A value that the map understands."""
        self.understood.add(key)
        return self.values[key]

    def take_all(self, *keys: str) -> dict[str, Any]:
        """Values that are called the same here."""
        return {key: self.take(key) for key in keys}

    def fixed(self, key: str, *valid: Any) -> None:
        """Understand a value of which this library has these alone.

        Raises:
            UserError: for another one.
        """
        value = self.take(key)
        if value not in valid:
            self.refuse(key, f"only {' or '.join(map(repr, valid))} can be computed here")

    def ignore(self, *keys: str) -> None:
        """Understand values that take no part in the computation."""
        self.understood.update(keys)

    def refuse(self, key: str, reason: str) -> None:
        """Raise UserError for the value of `key`."""
        raise UserError(f"{self.model_type}: config.json has {key} {self.values[key]!r}; {reason}")

    def rope(self) -> dict[str, Any]:
        """`rope_theta`, `rope_fraction` and `rope_scaling` of an attention layer of ours."""
        self.understood.update(_ROPE)
        given = self.values["rope_parameters"]
        scaling = {key: value for key, value in given.items() if value is not None}
        scaling.pop("finetuned", None)  # what a file was made with
        theta = scaling.pop("rope_theta")
        fraction = scaling.pop("partial_rotary_factor", None)
        scaling.pop("type", None)  # an older spelling of rope_type
        found: dict[str, Any] = {"rope_theta": float(theta)}
        if fraction not in (None, 1.0):
            found["rope_fraction"] = float(fraction)
        if scaling["rope_type"] != "default":
            found["rope_scaling"] = scaling
        return found

    def tokens(self) -> dict[str, int | None]:
        """`pad_token_id`, `bos_token_id` and `eos_token_id`: of several, the first."""
        found = {}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = self.take(key)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None and not isinstance(value, int):
                self.refuse(key, "it must be a number, or a list of numbers")
            found[key] = None if value is None or value < 0 else value  # -1 stands for none
        return found

    def finish(self) -> None:
        """Raise UserError for a value that no one took and that may change the computation.

        A switch that is off, and an option without a value, change nothing.
        """
        known = self.understood | _DESCRIPTIVE | _GENERATION
        for key, value in self.given.items():
            if key in known or key.startswith(_OF_TOOLS):
                continue
            if not any(value is off for off in (None, False)) and value not in ({}, []):
                self.refuse(key, "what it changes is not known here, so it cannot be left out")


def standardized(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a config.json as transformers reads it, defaults and today's spellings.

    Raises:
        UserError: for values that its config class refuses.
    """
    return _config(model_type, values).to_dict()


def written(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of these values as transformers writes it.

    Raises:
        UserError: for values that its config class refuses.
    """
    return _config(model_type, values).to_diff_dict()


def _config(model_type: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(values)))
    except (StrictDataclassError, ValueError, *_MALFORMED) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[-1].strip()
        raise UserError(f"{model_type}: config.json is not valid ({reason})") from error
