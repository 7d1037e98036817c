"""The model to be judged, from a run folder or the Hub."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from memlm.errors import UserError
from memlm.models import MemLMConfig, MemLMForCausalLM, load_attached
from memlm.models.attached_files import is_attached


def load_model(source: str) -> PreTrainedModel:
    """The model of a folder or a Hub id, in evaluation mode.

    It is a MemLMForCausalLM, or a pretrained model with the attached memory that is found there.

    Raises:
        UserError: when nothing is there, it is of another architecture, or its weights are
            missing, damaged or those of another configuration; when the pretrained model is gone or
            is not the one that the memory was trained on.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file() and is_attached(source):
        try:
            return load_attached(source).eval()
        except UserError as error:
            raise UserError(f"model: {error}") from error
    if folder.is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        raise UserError(f"model: {source!r} is no model folder (it has no config.json)")
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise UserError(f"model: {source}/config.json is not valid JSON") from error
        raise UserError(
            f"model: there is no folder {source!r}, and no such model was found on the Hub"
        ) from error
    found = values.get("model_type")
    if found != MemLMConfig.model_type:
        raise UserError(
            f"model: {source!r} holds a model of type {found!r}; only {MemLMConfig.model_type!r} "
            "models can be evaluated"
        )
    try:
        model, report = MemLMForCausalLM.from_pretrained(source, output_loading_info=True)
    except UserError as error:
        raise UserError(f"model: {source}: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: the weights of {source!r} cannot be loaded ({reason})") from error
    # transformers starts missing weights at random, with no more than a warning.
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            raise UserError(
                f"model: the weights of {source!r} do not fit its config.json "
                f"({kind.replace('_', ' ')}: {', '.join(sorted(report[kind])[:3])})"
            )
    return model.eval()
