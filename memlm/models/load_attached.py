"""Saved memories, put back on the models that they belong to."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from memlm.errors import UserError
from memlm.models.attach import attach_memory, check_weights
from memlm.models.attached import AttachedMixin
from memlm.models.attached_files import (
    CONFIG_FILE,
    base_fingerprint,
    own_tensors,
    read_attached,
)


def load_memory(
    model: PreTrainedModel, source: str | os.PathLike, revision: str | None = None
) -> PreTrainedModel:
    """Attach a saved memory to the model that it was trained on, in place.

    Args:
        model: the model, without a memory, with the weights that it had then.
        source: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Returns:
        The same model.

    Raises:
        UserError: when nothing is there, for another model, or weights that are missing, damaged or
            those of another config. The model is as it was then.
    """
    if isinstance(model, AttachedMixin):
        raise UserError("the model has a memory already; detach_memory() first")
    return _attach(model, *read_attached(source, revision), source)


def load_attached(
    source: str | os.PathLike, revision: str | None = None, **options: Any
) -> PreTrainedModel:
    """The model that a saved memory belongs to, loaded by its recorded name, with the memory.

    Args:
        source: a folder or a Hub id with a memory.
        revision: branch, tag or commit of the memory on the Hub.
        options: further arguments of `AutoModelForCausalLM.from_pretrained`; the revision of the
            model is the one that the memory was trained on, and so is its dtype unless given.

    Raises:
        UserError: as `load_memory`, or when the model cannot be loaded by its name.
    """
    config, tensors = read_attached(source, revision)
    base = config["base_model"]
    if not base["name"]:
        raise UserError(
            f"{source}: the model that this memory belongs to had no name; load it yourself and "
            "call memlm.load_memory(model, ...)"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base["name"], revision=base["revision"] or "main", **{"dtype": base["dtype"]} | options
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: the model {base['name']!r} that this memory belongs to cannot be loaded "
            f"({reason})"
        ) from error
    model.config._commit_hash = base["revision"]  # goes on with what is saved next
    return _attach(model, config, tensors, source)


def _attach(
    model: PreTrainedModel,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    source: str | os.PathLike,
) -> PreTrainedModel:
    _check_base(model, config["base_model"], source)
    attach_memory(model, config["attach"])
    try:
        _load_weights(model, tensors, source)
    except UserError:
        model.detach_memory()
        raise
    return model


def _check_base(model: PreTrainedModel, base: dict[str, Any], source: str | os.PathLike) -> None:
    """Raise UserError unless the memory was trained on a model with the same weights."""
    name = base["name"] or "a model without a name"
    if model.config.model_type != base["model_type"]:
        raise UserError(
            f"{source}: this memory belongs to a {base['model_type']} model ({name}), not to a "
            f"{model.config.model_type} model"
        )
    check_weights(model)
    if base_fingerprint(model) == base["weights"]:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    hint = ""
    if dtype != base["dtype"]:
        hint = (
            f"; it was in {base['dtype']} then and is in {dtype} now: load it with "
            f'dtype="{base["dtype"]}"'
        )
    raise UserError(
        f"{source}: the weights of the model are not those that this memory was trained on "
        f"({name}){hint}"
    )


def _load_weights(
    model: AttachedMixin, tensors: dict[str, Tensor], source: str | os.PathLike
) -> None:
    """Put saved weights into an attached memory.

    Raises:
        UserError: for weights that do not fit.
    """
    own = own_tensors(model.state_dict())
    for kind, names in (("missing", own.keys() - tensors), ("unexpected", tensors.keys() - own)):
        if names:
            raise UserError(
                f"{source}: the weights do not fit {CONFIG_FILE} "
                f"({kind}: {', '.join(sorted(names)[:3])})"
            )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{source}: the weights do not fit {CONFIG_FILE} ({name} is "
                f"{list(tensors[name].shape)} instead of {list(tensor.shape)})"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
