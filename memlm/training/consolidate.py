"""A checkpoint becomes a model folder: `python -m memlm.training.consolidate CHECKPOINT FOLDER`.

Weights that processes wrote in parts (FSDP2, tables that several hold together) are read in one
process, as much at a time as one file of the result holds.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from memlm.cli import Parser, run_entry_point
from memlm.data import load_tokenizer
from memlm.errors import UserError
from memlm.files import write_folder
from memlm.models import MemLMConfig, MemLMForCausalLM
from memlm.models.attached_files import is_attached
from memlm.models.stub import STUB_FILE
from memlm.push import model_files
from memlm.training.checkpoint import find_checkpoint
from memlm.training.sharded import WEIGHTS, Parts, has_parts, read_parts, stored_parts

FILE_BYTES = 5 * 10**9  # of weights in one file; a larger tensor has a file of its own


def main(argv: Sequence[str] | None = None) -> int:
    """Consolidate as the command line says; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m memlm.training.consolidate",
        description="Make a model folder, with whole weights, of a checkpoint.",
        allow_abbrev=False,
    )
    help = "a checkpoint, or a run folder: its newest whole one"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=help)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one, for the model")
    options = parser.parse_args(argv)
    print(consolidate(options.checkpoint, options.folder))


def consolidate(checkpoint: Path, folder: Path) -> str:
    """Write config, tokenizer and whole weights of a checkpoint into a new folder.

    The folder is there as a whole or not at all. Weights keep every bit.

    Args:
        checkpoint: of any run, or a run folder, of which its newest whole checkpoint is taken.
        folder: new, or empty.

    Returns:
        A line that says what was done.

    Raises:
        UserError: for a folder that is not empty, a checkpoint that is damaged or holds no model,
            or a disk that is full.
    """
    named = folder.name not in ("", "..")  # it is put in its place by a rename
    if not named or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"{folder}: not an empty folder; name a new one")
    source = find_checkpoint(checkpoint, folder)
    if has_parts(source) and not is_attached(source):
        stored = stored_parts(source, WEIGHTS)
        write_folder(folder, lambda new: _write_model(source, stored, new), "run it again")
        return f"{folder}: {len(stored)} tensors of {source}, made whole"
    files = model_files(source)
    write_folder(folder, lambda new: _copy_model(source, files, new), "run it again")
    return f"{folder}: copied from {source}, whose weights were whole"


def _write_model(source: Path, stored: Parts, folder: Path) -> None:
    config = MemLMConfig.from_pretrained(source)
    config.architectures = [MemLMForCausalLM.__name__]
    config.dtype = str(stored["model.embed_tokens.weight"].properties.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    load_tokenizer(str(source)).save_pretrained(folder)
    shapes = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in stored.items()
    }
    division = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES
    )
    for file, names in division.filename_to_tensors.items():
        tensors = {name: torch.empty_like(shapes[name], device="cpu") for name in names}
        read_parts(source, WEIGHTS, tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if division.is_sharded:
        index = {"metadata": division.metadata, "weight_map": division.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _copy_model(source: Path, files: Sequence[Path], folder: Path) -> None:
    beside = [source / name for name in (CONFIG_NAME, STUB_FILE)]
    for path in [*files, *filter(Path.is_file, beside)]:
        shutil.copy(path, folder)
    if (source / TOKENIZER_CONFIG_FILE).is_file():
        load_tokenizer(str(source)).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
