"""The memory of a conversation as a file: what a model has read, for the same model to go on from.

One safetensors file holds the tensors of all states. Its metadata say which model they belong to
and carry a fingerprint of the tensors.
"""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from memlm.errors import UserError
from memlm.files import write_file
from memlm.fingerprint import fingerprint
from memlm.layers.state import MemoryState
from memlm.models.cache import MemLMCache

FORMAT = "memlm memory state"
SCHEMA = 1
KEY = "memlm"  # of the metadata, with the manifest as JSON
_FIELDS = {"memlm_version", "model", "weights", "dtype", "batch_size", "tokens", "states"}
# What every model has in its config, and what does not change what a given text is answered with.
_NEUTRAL = {
    *PreTrainedConfig().to_dict(),
    "use_cache",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

States = dict[str, MemoryState]


def save_memory_state(
    model: PreTrainedModel, path: str | os.PathLike, states: MemLMCache | States
) -> None:
    """Write what a conversation has left in the states of a model; see `load_memory_state`.

    A kill at any moment leaves the old file or the new one. All weights of the model are read for
    their fingerprint.

    Args:
        model: the one that read the conversation; with a memory of memlm.
        path: the file; its folder is made if needed.
        states: `generate(..., return_dict_in_generate=True).past_key_values`, or the
            `memory_states` of a call.

    Raises:
        UserError: for states that are empty or another model's, a store on disk that is gone, or a
            file that cannot be written.
    """
    path = Path(path)
    if isinstance(states, MemLMCache):
        states = states.states
    if not isinstance(states, Mapping) or not states:
        raise UserError(
            f"{path}: there is no memory state to save; give the past_key_values that a call or "
            "generate(..., return_dict_in_generate=True) returned"
        )
    _check_names(states, model, "the states are those of another model")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    tensors = {
        f"{name}/{field}": tensor.detach().cpu().contiguous().clone()
        for name, state in states.items()
        for field, tensor in state.tensors().items()
    }
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "memlm_version": version("memlm"),
        "model": describe(model),
        "weights": model.weights_fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": states["position"].batch_size,
        "tokens": states["position"].next_position.tolist(),
        "states": {
            name: {
                "class": type(state).__name__,
                "dtypes": {
                    field: str(tensor.dtype).removeprefix("torch.")
                    for field, tensor in state.tensors().items()
                },
            }
            for name, state in states.items()
        },
        "tensors": fingerprint(tensors),
    }
    metadata = {"format": "pt", KEY: json.dumps(manifest)}
    write_file(path, lambda new: save_file(tensors, new, metadata), then="save it again")


def load_memory_state(model: PreTrainedModel, path: str | os.PathLike) -> MemLMCache:
    """The states of a saved conversation, on the model's device.

    Returns:
        A cache whose rows `generate(new_ids, past_key_values=cache)` continues with new tokens: it
        gives what it would give for the whole conversation with these tokens behind it.

    Raises:
        UserError: for a file that is missing, damaged or of another kind, and for a model of
            another type, config or other weights than the one that saved it.
    """
    path = Path(path)
    manifest, tensors = _read(path)
    own = describe(model)
    if own["model_type"] != manifest["model"].get("model_type"):
        raise UserError(
            f"{path}: saved by a {manifest['model'].get('model_type')} model, this is a "
            f"{own['model_type']} model"
        )
    difference = _difference(manifest["model"], own)
    if difference:
        raise UserError(f"{path}: saved by a model of another config: {difference}")
    if manifest["weights"] != model.weights_fingerprint():
        dtype = str(model.dtype).removeprefix("torch.")
        reason = "with other weights"
        if manifest["dtype"] != dtype:
            reason = f"in {manifest['dtype']}, this one is in {dtype}: load it in the same dtype"
        raise UserError(f"{path}: saved by a model of the same config {reason}")
    templates = _check_names(manifest["states"], model, f"{path}: it holds other states")
    states: States = {}
    for name, entry in manifest["states"].items():
        kind, found = type(templates[name]), tensors.get(name, {})
        if entry["class"] != kind.__name__ or entry["dtypes"].keys() != found.keys():
            raise UserError(
                f"{path}: {name!r} is a {entry['class']} of {sorted(found)}; this version of memlm "
                f"({version('memlm')}, it was saved by {manifest['memlm_version']}) keeps a "
                f"{kind.__name__} there"
            )
        try:
            states[name] = kind.from_state_dict(found).to(model.device)
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]}") from error
    return MemLMCache(states)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What has to be the same, beside the weights, for a state to mean the same: plain values.

    A store on disk counts by what is in it, wherever it lies.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NEUTRAL}
    attachment = getattr(model, "attachment", None)
    described = {
        "model_type": model.config.model_type,
        "config": config,
        "attach": None if attachment is None else attachment.config.to_mapping(),
    }
    described = json.loads(json.dumps(described, default=str))
    for part in (described["config"], described["attach"] or {}):
        output = part.get("output")
        if isinstance(output, dict) and output.get("store") is not None:
            output["store"] = _output_memory(model).store_fingerprint()
    return described


def _output_memory(model: PreTrainedModel) -> Any:
    return model.memories()["output"]


def _check_names(states: Mapping[str, Any], model: PreTrainedModel, otherwise: str) -> States:
    """The states of an empty row of the model.

    Raises:
        UserError: unless `states` has the same names; it begins with `otherwise`.
    """
    templates = model.init_states(1)
    if states.keys() != templates.keys():
        raise UserError(
            f"{otherwise}: they are {sorted(states)}, but this one has {sorted(templates)}"
        )
    return templates


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The manifest of a file and its tensors by state and field.

    Raises:
        UserError: for a file that is missing, damaged or of another kind.
    """
    if not path.is_file():
        reason = "is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {reason}; give one that save_memory_state has written")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file") from error
    try:
        manifest = json.loads(text or "null")
    except ValueError as error:
        raise UserError(f"{path}: damaged (its manifest is not valid JSON)") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: a safetensors file, but not that of a memory state")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: written with schema {manifest.get('schema')!r}; this version of memlm reads "
            f"schema {SCHEMA}"
        )
    missing = _FIELDS - manifest.keys()
    if missing:
        raise UserError(f"{path}: damaged (its manifest has no {sorted(missing)[0]!r})")
    if fingerprint(tensors) != manifest.get("tensors"):
        raise UserError(f"{path}: damaged (its tensors are not those that were saved)")
    by_state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        by_state.setdefault(name, {})[field] = tensor
    return manifest, by_state


def _difference(saved: Any, own: Any, where: str = "") -> str | None:
    """What differs first between two trees of plain values; None where they are equal.

    Keys that only one of two mappings has are those of another version: they do not count if they
    are None or the mapping is the config itself.
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted({*saved, *own}):
            if where == "config" and not (key in saved and key in own):
                continue
            place = f"{where}.{key}" if where else key
            found = _difference(saved.get(key), own.get(key), place)
            if found:
                return found
        return None
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        pairs = enumerate(zip(saved, own, strict=True))
        found = (_difference(a, b, f"{where}[{index}]") for index, (a, b) in pairs)
        return next(filter(None, found), None)
    if saved == own:
        return None
    return f"{where} is {_short(saved)} there and {_short(own)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
