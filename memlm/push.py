"""A finished run goes to the Hub: `python -m memlm.push runs/NAME OWNER/NAME`.

Model, tokenizer, model card and its pictures are one commit. Weights are uploaded from where they
lie, as they are.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from memlm.cli import Parser, run_entry_point
from memlm.data import load_tokenizer
from memlm.errors import UserError
from memlm.models import MemLMConfig
from memlm.models.attached_files import CONFIG_FILE as MEMORY_CONFIG
from memlm.models.attached_files import WEIGHTS_FILE as MEMORY_WEIGHTS
from memlm.models.card import card_config, write_card
from memlm.models.upload import push_folder

_MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "generation_config.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Push as the command line says; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _push(argv))


def _push(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m memlm.push",
        description="Upload the model of a run folder or of a checkpoint, with its model card.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint in it")
    parser.add_argument("repository", metavar="OWNER/NAME", help="made where there is none")
    parser.add_argument("--private", action="store_true", help="nobody else sees a new repository")
    parser.add_argument("--license", help="of the weights, as the Hub spells it: apache-2.0, ...")
    parser.add_argument("--revision", metavar="BRANCH", help="made where there is none; or main")
    options = parser.parse_args(argv)
    files = model_files(options.run)
    config = card_config(options.run)
    if config is None:
        raise UserError(
            f"{options.run}: no model of memlm and no memory for one; transformers pushes others: "
            "AutoModelForCausalLM.from_pretrained(...).push_to_hub(...)"
        )
    tokenizer = None
    # A memory for a pretrained model goes without one: the tokenizer is that model's.
    if isinstance(config, MemLMConfig) or (options.run / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = load_tokenizer(str(options.run))

    def write(folder: Path) -> None:
        for path in files:
            (folder / path.name).symlink_to(path.resolve())
        if isinstance(config, MemLMConfig):
            config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, config, options.run, options.repository, options.license)

    address = push_folder(
        options.repository,
        write,
        private=options.private or None,
        revision=options.revision,
    )
    print(address)


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its model, or the memory for a pretrained one.

    Raises:
        UserError: when it holds neither.
    """
    memory = [folder / MEMORY_CONFIG, folder / MEMORY_WEIGHTS]
    if all(path.is_file() for path in memory):
        return memory
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return [path for pattern in _MODEL_FILES for path in sorted(folder.glob(pattern))]
    inside = [path.parent for path in folder.glob("checkpoints/*/model*.safetensors")]
    hint = f"; did you mean {max(inside)}?" if inside else ""
    raise UserError(f"{folder}: no model there (no config.json with model.safetensors){hint}")


if __name__ == "__main__":
    sys.exit(main())
