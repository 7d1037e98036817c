"""Models that start from a pretrained one, and what they will be before any weight is read."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from memlm.errors import UserError
from memlm.models.configuration import MemLMConfig
from memlm.models.insert import insert
from memlm.models.insert_config import InsertConfig
from memlm.models.interop.checkpoint import Checkpoint
from memlm.models.interop.plan import from_theirs, is_foreign
from memlm.models.modeling import MemLMForCausalLM

INSERT = "model.insert"  # the section of a run config


def retrofit_config(name: str, options: InsertConfig | None) -> MemLMConfig:
    """The config of a pretrained model as one of this library, with new memories.

    Args:
        name: folder or Hub id; no weights are read.
        options: of the new memories; None = there are none.

    Raises:
        UserError: when there is no such model, it cannot become one of this library, or the
            memories do not fit it.
    """
    config = _base_config(name)
    if options is None:
        return config
    with torch.device("meta"):
        return insert(MemLMForCausalLM(config), options, INSERT).config


def base_source(name: str) -> str:
    """A folder by its whole path, so that what is saved finds it from anywhere; else the Hub id."""
    place = Path(name)
    return str(place.resolve()) if place.is_dir() else name


def describe_base(name: str) -> dict[str, Any]:
    """The name of a pretrained model, and its commit on the Hub; None for a folder."""
    source, commit = base_source(name), None
    if not Path(source).is_dir():
        try:
            commit = extract_commit_hash(cached_file(source, CONFIG_NAME), None)
        except OSError as error:
            raise cannot_load(name, error) from error
    return {"name": source, "revision": commit}


def cannot_load(name: str, error: Exception) -> UserError:
    """The error of a pretrained model that is missing, damaged or unknown, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"model.pretrained: {name!r} cannot be loaded as a causal language model ({lines[0]})"
    )


def _base_config(name: str) -> MemLMConfig:
    source = base_source(name)
    try:
        checkpoint = Checkpoint(source, headers_only=True)
        if is_foreign(checkpoint.config):
            return from_theirs(checkpoint).config
        return MemLMConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise cannot_load(name, error) from error
