"""The pretrained models that runs start from."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.data import load_tokenizer
from memlm.data.shard_manifest import tokenizer_hash
from memlm.errors import UserError
from memlm.models import MemLMForCausalLM
from memlm.models.retrofit import base_source, cannot_load, describe_base
from memlm.training.saving import no_progress_bars

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)


def load_base(name: str) -> PreTrainedModel:
    """The causal language model of a folder or a Hub id, of its own class, in float32.

    A folder is remembered by its whole path, so that what is saved finds it from anywhere. Code
    that comes with a model is never run.

    Raises:
        UserError: when there is none, or it cannot be loaded.
    """
    base = describe_base(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base["name"],
            revision=base["revision"] or "main",
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except _LOADING_ERRORS as error:
        raise cannot_load(name, error) from error
    model.config._commit_hash = base["revision"]  # transformers itself does not keep it
    return model


def load_own(name: str) -> MemLMForCausalLM:
    """The model of a folder or a Hub id as one of this library, in float32, with all its weights.

    Raises:
        UserError: when there is none, or it cannot be loaded or become one of this library.
    """
    try:
        return _load_whole(base_source(name), "")
    except _LOADING_ERRORS as error:
        raise cannot_load(name, error) from error


def load_checkpoint(folder: Path) -> MemLMForCausalLM:
    """The model of a checkpoint, in float32, which has to hold exactly its weights.

    Raises:
        UserError: for other weights than its config asks for.
    """
    return _load_whole(folder, f"{folder}: ", "; resume another checkpoint")


def _load_whole(source: str | Path, before: str, after: str = "") -> MemLMForCausalLM:
    """A model, or an error between those words unless it was loaded with exactly its weights."""
    with no_progress_bars():
        model, found = MemLMForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    for kind in ("missing", "unexpected"):
        if found[f"{kind}_keys"]:
            name = min(found[f"{kind}_keys"])
            raise UserError(
                f"{before}its weights are not those of its config ({name!r} is {kind}){after}"
            )
    # From now on it is another model: the card of the run that it comes from does not describe it.
    model.name_or_path = model.config.name_or_path = ""
    return model


def check_vocabulary(
    name: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase, given: str
) -> None:
    """Raise UserError for a tokenizer with more tokens than a pretrained model knows.

    Arguments as in `check_tokenizer`.
    """
    if vocab_size < len(tokenizer):
        raise UserError(
            f"data.tokenizer: {given!r} has {len(tokenizer)} tokens, but {name!r} knows "
            f"{vocab_size}; leave it out for the model's own"
        )


def check_tokenizer(
    name: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase, given: str
) -> None:
    """Raise UserError for a tokenizer that is not the pretrained model's, or has more tokens.

    Args:
        name: of the model; one without a tokenizer of its own takes any.
        vocab_size: tokens that the model knows.
        tokenizer: of the data.
        given: how the config names it.
    """
    check_vocabulary(name, vocab_size, tokenizer, given)
    if given == name:
        return
    try:
        own = load_tokenizer(name)
    except UserError:
        return
    if tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise UserError(
            f"data.tokenizer: {given!r} is not the tokenizer of {name!r}; leave it out for the "
            "model's own"
        )
