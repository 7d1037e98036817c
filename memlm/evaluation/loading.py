"""The model to be judged, from a run folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.subject import MemorySubject, Subject
from memlm.evaluation.transformers_subject import TransformersSubject
from memlm.models import MemLMConfig, MemLMForCausalLM, load_attached
from memlm.models.attached import AttachedMixin
from memlm.models.attached_files import is_attached

VALID = (
    "valid: a model of memlm, a saved memory, or a causal language model of transformers such as "
    "Llama, Qwen, Gemma, GPT-2 or Mamba"
)

_LOADING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    SafetensorError,
)


def load_subject(
    source: str,
    tokenizer: str | None,
    config: EvaluationConfig,
    device: torch.device | str,
    name: str | None = None,
) -> Subject:
    """The model of a folder or a Hub id with its tokenizer, ready to be asked.

    Args:
        source: folder or Hub id.
        tokenizer: as for `load_tokenizer`; None = the one beside the model.
        config: of the evaluation.
        device: where the model goes.
        name: what reports call it; None = the last part of `source`.

    Raises:
        UserError: as `load_model`; when there is no tokenizer, or one of another model.
    """
    model = load_model(source).to(device)
    found = load_tokenizer(source if tokenizer is None else tokenizer)
    check_sizes(model, found)
    subject = make_subject(model, found, config, name or Path(source).name, source)
    subject.tokenizer_source = source if tokenizer is None else tokenizer
    return subject


def make_subject(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    config: EvaluationConfig,
    name: str = "model",
    source: str | None = None,
) -> Subject:
    """A subject of the kind that the model is.

    Args:
        model: in evaluation mode.
        tokenizer: what it was trained with; None where token ids are all there is.
        config: of the evaluation.
        name: what reports call it.
        source: folder or Hub id; None for a model in memory.

    Raises:
        UserError: for a model that is not causal or cannot run.
    """
    if isinstance(model, MemLMForCausalLM | AttachedMixin) or hasattr(model, "memories"):
        plan = make_plan(model, config.conditions)
        return MemorySubject(model, tokenizer, plan, config.segment, name, source)
    return TransformersSubject(model, tokenizer, config.segment, config.conditions, name, source)


def check_tokenizer(subject: Subject) -> None:
    """Raise UserError when the tokenizer has more tokens than the model."""
    if subject.tokenizer is not None:
        check_sizes(subject.model, subject.tokenizer)


def check_sizes(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer has more tokens than the model."""
    config = model.config
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config(decoder=True)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens, the model knows {config.vocab_size}; "
            "give the one the model was trained with"
        )


def load_model(source: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a folder or a Hub id, in evaluation mode.

    It is a MemLMForCausalLM, a pretrained model with the attached memory that is found there, or
    another causal language model of transformers. No code from the checkpoint is run.

    Args:
        source: folder or Hub id.
        dtype: of the weights; "auto" = the one that they are saved in.

    Raises:
        UserError: when nothing is there, it is no causal language model, or its weights are
            missing, damaged or those of another configuration; when the pretrained model of a
            memory is gone or is not the one that the memory was trained on.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file() and is_attached(source):
        try:
            options = {} if dtype == "auto" else {"dtype": dtype}
            return load_attached(source, **options).eval()
        except UserError as error:
            raise UserError(f"model: {error}") from error
    _check_folder(folder, source)
    values = _read_config(source)
    if values.get("model_type") == MemLMConfig.model_type:
        return _load(MemLMForCausalLM, source, dtype)
    _check_architecture(values, source)
    return _load(AutoModelForCausalLM, source, dtype)


def _check_folder(folder: Path, source: str) -> None:
    """Raise UserError for a file, and for a folder that holds something else than a model."""
    if folder.is_file():
        raise UserError(
            f"model: {source!r} is a file; give a folder with config.json and model.safetensors"
        )
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        reason = f"model: {source!r} is no model folder (it has no config.json)"
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{reason}: it holds an adapter; merge it into its model and save that")
        inside = [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/config.json")]
        if inside:
            latest = max(inside, key=lambda path: path.stat().st_mtime).parent
            reason += f"; did you mean {str(latest)!r}?"
        raise UserError(reason)
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"model: the weights in {source!r} are pickles (.bin), which can run code when they "
            "are loaded; save the model as safetensors"
        )


def _read_config(source: str) -> dict[str, Any]:
    """What config.json holds."""
    is_folder = Path(source).is_dir()
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        if is_folder:
            raise UserError(f"model: {source}/config.json is not valid JSON") from error
        raise UserError(
            f"model: there is no folder {source!r}, and no such model was found on the Hub"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"model: {source}/config.json is no configuration of a model")
    return values


def _check_architecture(values: dict[str, Any], source: str) -> None:
    """Raise UserError unless transformers itself has a causal language model for this config."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"model: the config.json of {source!r} names no model_type; {VALID}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in CONFIG_MAPPING:
        if "auto_map" in values:
            raise UserError(
                f"model: {source!r} (model type {kind!r}) needs code that comes with the "
                "checkpoint, which is never run; use a version of the model whose code is in "
                "transformers"
            )
        raise UserError(
            f"model: {source!r} holds a model of type {kind!r}, which transformers "
            f"{transformers.__version__} does not know; {VALID}"
        )
    saved = values.get("architectures") or ()
    if kind not in causal or (saved and not set(causal.values()).intersection(saved)):
        what = ", ".join(map(str, saved)) or f"a model of type {kind!r}"
        raise UserError(f"model: {source!r} holds no causal language model ({what}); {VALID}")


def _load(loader: Any, source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model with all of its weights.

    Raises:
        UserError: when they are missing, damaged or do not fit.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what transformers says in a table is said in one line below
    try:
        model, report = loader.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
        )
    except UserError as error:
        raise UserError(f"model: {source}: {error}") from error
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: the config.json of {source!r} is not valid ({reason})") from error
    except _LOADING_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, KeyError):
            reason = f"unknown: {reason}"
        raise UserError(f"model: the weights of {source!r} cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    sizes = sorted(
        f"{name} is {list(saved)} instead of {list(wanted)}"
        for name, saved, wanted in report["mismatched_keys"]
    )
    # transformers starts such weights at random, with no more than a warning.
    for kind, names in (
        ("sizes", sizes),
        ("missing keys", sorted(report["missing_keys"])),
        ("unexpected keys", sorted(report["unexpected_keys"])),
    ):
        if names:
            raise UserError(
                f"model: the weights of {source!r} do not fit its config.json "
                f"({kind}: {', '.join(names[:3])})"
            )
    return model.eval()
