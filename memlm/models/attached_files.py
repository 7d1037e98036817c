"""The files of an attached memory: its own weights, and which model they belong to."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from memlm.errors import UserError
from memlm.fingerprint import fingerprint
from memlm.models.lora import is_lora_name

WEIGHTS_FILE = "memory.safetensors"
CONFIG_FILE = "memory_config.json"
FORMAT = "memlm attached memory"
SCHEMA = 1
_FIELDS = {"attach", "base_model", "memory_weights", "memlm_version"}
_BASE_FIELDS = {"name", "revision", "model_type", "dtype", "weights"}


def save_attached(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the memory's weights (and those of adapters) and their config; nothing of the model's.

    Each file is complete under another name before it takes its own.

    Args:
        model: with an attached memory.
        folder: made if needed.
        state_dict: all weights of the model where it does not hold them itself (sharded training).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = own_tensors(model.state_dict() if state_dict is None else state_dict)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    config = {
        "format": FORMAT,
        "schema": SCHEMA,
        "memlm_version": version("memlm"),
        "attach": model.attachment.config.to_mapping(),
        "base_model": {
            "name": model.name_or_path,
            "revision": getattr(model.config, "_commit_hash", None),
            "model_type": model.config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": base_fingerprint(model, state_dict),
        },
        "memory_weights": fingerprint(tensors),
    }
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def is_attached(source: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id holds an attached memory."""
    try:
        return _find(source, CONFIG_FILE, revision) is not None
    except UserError:
        return False


def base_fingerprint(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None = None) -> str:
    """The fingerprint of a model's own weights, whatever memory or adapters it has besides.

    Numbers of 16 bits count as the same numbers in float32: a model is the same model in both.
    `state_dict` as for `save_attached`.
    """
    return fingerprint(_BaseWeights(model, state_dict))


class _BaseWeights(Mapping[str, Tensor]):
    """Weights of a model by their first names, read one at a time."""

    def __init__(self, model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None):
        self.parameters = {
            name.replace(".base_layer.", "."): (state_dict or {}).get(name, parameter)
            for name, parameter in model.named_parameters()
            if not _is_own(name)
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.parameters[name].detach()
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def _is_own(name: str) -> bool:
    """Whether a weight was added to the model."""
    return name.startswith("memory.") or is_lora_name(name)


def own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a model, those of its memory and of adapters."""
    return {name: tensor for name, tensor in tensors.items() if _is_own(name)}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_attached_config(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """The config of a saved memory.

    Raises:
        UserError: when nothing is there, or something damaged or of another version.
    """
    path = _find(source, CONFIG_FILE, revision)
    if path is None:
        raise UserError(f"{source}: no attached memory there (it has no {CONFIG_FILE})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {CONFIG_FILE} is damaged (not valid JSON)") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{source}: {CONFIG_FILE} is not that of an attached memory")
    if config.get("schema") != SCHEMA:
        raise UserError(
            f"{source}: written with schema {config.get('schema')!r}; this version of memlm reads "
            f"schema {SCHEMA}"
        )
    missing = _FIELDS - config.keys()
    if not missing and not isinstance(config["base_model"], dict):
        raise UserError(f"{source}: 'base_model' in {CONFIG_FILE} is no mapping")
    missing = missing or _BASE_FIELDS - config["base_model"].keys()
    if missing:
        raise UserError(f"{source}: {CONFIG_FILE} has no {sorted(missing)[0]!r}")
    return config


def read_attached(
    source: str | os.PathLike, revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a saved memory.

    Raises:
        UserError: when nothing is there, or something damaged or of another version.
    """
    config = read_attached_config(source, revision)
    weights = _find(source, WEIGHTS_FILE, revision)
    if weights is None:
        raise UserError(f"{source}: the weights of the memory are missing ({WEIGHTS_FILE})")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source}: {WEIGHTS_FILE} is damaged (no safetensors file)") from error
    if fingerprint(tensors) != config["memory_weights"]:
        raise UserError(
            f"{source}: {WEIGHTS_FILE} is damaged or of another save (its fingerprint differs from "
            f"the one in {CONFIG_FILE})"
        )
    return config, tensors


def _find(source: str | os.PathLike, name: str, revision: str | None) -> Path | None:
    """A file of a folder or of the Hub; None where the folder or repository has none."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(
            f"there is no folder {str(source)!r}, and no such memory was found on the Hub"
        ) from error
