"""Sizes of a model and what stands at each site of its blocks."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from memlm.errors import UserError, nearest, require_known
from memlm.layers.attention_config import AttentionConfig, SlidingAttentionConfig
from memlm.layers.moe import MixtureOfExpertsConfig
from memlm.memory import memory_config, memory_names
from memlm.memory.output_memory import OUTPUT, OutputMemoryConfig, output_memory_config
from memlm.models.stub import AUTO_MAP, write_stub
from memlm.specification import build_config

MIXERS = {
    "attention": strict(AttentionConfig),
    "sliding_attention": strict(SlidingAttentionConfig),
}


@dataclasses.dataclass(kw_only=True)
class SwiGLUConfig:
    """intermediate_size: width of the feed-forward layer; None = the model's."""

    intermediate_size: int | None = None


FEED_FORWARDS = {"swiglu": strict(SwiGLUConfig), "moe": strict(MixtureOfExpertsConfig)}
SITES = ("mixer", "memory", "ffn")
NORMS = ("pre", "post", "sandwich")
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One block: at each site `(type name, its config)` or None, and where its norms stand."""

    mixer: tuple[str, Any] | None
    memory: tuple[str, Any] | None
    ffn: tuple[str, Any] | None
    norm: str


@strict
class MemLMConfig(PreTrainedConfig):
    """Configuration of MemLM models.

    Attributes:
        vocab_size: size of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of `swiglu`, and of each expert of `moe`; None = 8/3 hidden_size,
            rounded up to 64.
        layers: patterns `{repeat, mixer, memory, ffn, norm}`, top to bottom. A site holds a name
            or `{type: NAME, ...}` or null. mixer: attention, sliding_attention or a memory;
            memory (optional): a memory; ffn: swiglu, moe, or a memory such as product_key.
            norm: pre (default), post or sandwich.
        output: an output memory behind the head, a name or `{type: NAME, ...}`; None = none.
        max_position_embeddings: longest context the model may be given; None = unlimited.
        rms_norm_eps: epsilon of every RMSNorm of the backbone.
        zero_centered_norm: whether the gain of these is 1 + weight, the weight starting at 0, as
            in Gemma and Qwen3-Next. Memories have norms of their own, which stay as they are.
        initializer_range: standard deviation of new linear and embedding weights.
        tie_word_embeddings: whether the head is the embedding matrix.
        final_logit_softcapping: bound c of the logits, c tanh(logits / c); None = none.
    """

    model_type = "memlm"
    keys_to_ignore_at_inference = ["past_key_values", "memory_states"]

    vocab_size: int = 259
    hidden_size: int = 128
    intermediate_size: int | None = None
    layers: list | None = None
    output: dict | str | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    final_logit_softcapping: float | int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.layers is None:
            self.layers = [{"repeat": 2, "mixer": "attention", "ffn": "swiglu"}]
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        _refuse_unknown(type(self), kwargs)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise UserError(f"{name}: must be at least 1 and below 2^31, got {value}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(
                    f"{name}: must be in [0, vocab_size) or null, got {value} of {self.vocab_size}"
                )
        for name in ("rms_norm_eps", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: must be at least 0 and finite, got {getattr(self, name)}")
        cap = self.final_logit_softcapping
        if cap is not None and not 0 < cap < math.inf:
            raise UserError(f"final_logit_softcapping: must be positive and finite, got {cap}")
        # Plain dicts whatever the caller used, so that config.json holds them.
        self.layers = [
            dict(pattern) if isinstance(pattern, Mapping) else pattern for pattern in self.layers
        ]
        self.plan()
        if isinstance(self.output, Mapping):
            self.output = dict(self.output)
        self.output_plan()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers, with the module that loads it where memlm is not imported."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        write_stub(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: `save_pretrained` writes what AutoConfig needs, and copies no source files."""

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks."""
        return sum(pattern.get("repeat", 1) for pattern in self.layers)

    def plan(self) -> list[LayerPlan]:
        """The blocks from bottom to top.

        Raises:
            UserError: for an unknown name or key, a wrong type or an impossible size.
        """
        if not self.layers:
            raise UserError("layers: at least one pattern is needed")
        plans = []
        for index, pattern in enumerate(self.layers):
            where = f"layers.{index}"
            if not isinstance(pattern, dict):
                raise UserError(f"{where}: expected a mapping with mixer, memory, ffn")
            require_known(pattern, ("repeat", "norm", *SITES), where)
            repeat = pattern.get("repeat", 1)
            if type(repeat) is not int or not 1 <= repeat <= _MOST_LAYERS:
                raise UserError(
                    f"{where}.repeat: expected a number from 1 to {_MOST_LAYERS}, got {repeat!r}"
                )
            norm = pattern.get("norm", "pre")
            if norm not in NORMS:
                raise UserError(
                    f"{where}.norm: {norm!r} is not one of {', '.join(NORMS)}{nearest(norm, NORMS)}"
                )
            sites = {site: _resolve(site, pattern.get(site), f"{where}.{site}") for site in SITES}
            if not any(sites.values()):
                raise UserError(f"{where}: a layer needs a mixer, a memory or an ffn")
            self._validate_sizes(sites, where)
            plans += [LayerPlan(norm=norm, **sites)] * repeat
        return plans

    def output_plan(self) -> tuple[str, OutputMemoryConfig] | None:
        """`(name, config)` of the output memory, None without one.

        Raises:
            UserError: for an unknown name or key, or a wrong value.
        """
        return None if self.output is None else output_memory_config(self.output, OUTPUT)

    def _validate_sizes(self, sites: dict[str, tuple[str, Any] | None], where: str) -> None:
        for site, entry in sites.items():
            if entry is not None and hasattr(entry[1], "check_sizes"):
                try:
                    entry[1].check_sizes(self.hidden_size)
                except UserError as error:
                    raise UserError(f"{where}.{site}: {error}") from error
        window = sites["mixer"][1].attention_window if sites["mixer"] else None
        delay = sites["memory"][1].delay if sites["memory"] else 1
        if window is not None and delay > window:
            raise UserError(
                f"{where}: the memory's segment ({delay}) is longer than the attention window "
                f"({window}), so some tokens would be visible nowhere; use segment <= window"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MemLMConfig":
        """As in transformers.

        Raises:
            UserError: for the config of another architecture.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f"a {model_type} config is none of memlm; MemLMForCausalLM.from_pretrained "
                "converts a model with its config"
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_mapping(cls, values: dict[str, Any], where: str = "model") -> "MemLMConfig":
        """A config from the `model` section of a run, checked strictly.

        Raises:
            UserError: for an unknown key (with the nearest name) or a wrong value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        require_known(values, known, where)
        try:
            return cls(**values)
        except StrictDataclassError as error:
            cause = error.__cause__
            reason = str(cause or error).splitlines()[-1].strip()
            raise UserError(
                reason if isinstance(cause, UserError) else f"{where}: {reason}"
            ) from error
        except UserError as error:
            raise UserError(f"{where}.{error}") from error


def _refuse_unknown(cls: type, extra: dict[str, Any]) -> None:
    # transformers accepts unknown keys silently; these it writes or understands itself.
    accepted = {
        "transformers_version",
        "torch_dtype",
        "auto_map",
        "_name_or_path",
        "num_labels",
        "attn_implementation",
        "_attn_implementation",
        "_commit_hash",
        "model_type",
        "quantization_config",
        "num_hidden_layers",
        "name_or_path",
    }
    known = {field.name for field in dataclasses.fields(cls)} | accepted
    require_known(extra, known, "model config")


def _resolve(site: str, value: Any, where: str) -> tuple[str, Any] | None:
    if value is None:
        return None
    spec = {"type": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise UserError(f"{where}: expected a name or a mapping with `type: NAME`, got {value!r}")
    name = spec["type"]
    own = {"mixer": MIXERS, "memory": {}, "ffn": FEED_FORWARDS}[site]
    if name in own:
        values = {key: item for key, item in spec.items() if key != "type"}
        return name, build_config(own[name], values, where)
    if name not in memory_names():
        valid = sorted([*own, *memory_names()])
        raise UserError(
            f"{where}: unknown {site} {name!r}{nearest(name, valid)} (valid: {', '.join(valid)})"
        )
    return name, memory_config(spec, where)
