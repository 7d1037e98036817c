"""Another library's model as one of ours, or ours as another's:
`python -m memlm.models.convert SOURCE FOLDER [--to MODEL_TYPE]`.

Tensors are read, renamed and written one by one, and at most one file of them is in memory.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from memlm.cli import Parser, run_entry_point
from memlm.errors import UserError
from memlm.files import write_folder
from memlm.models.configuration import MemLMConfig
from memlm.models.interop import ARCHITECTURES
from memlm.models.interop.checkpoint import Checkpoint
from memlm.models.interop.conversion import Report, count
from memlm.models.interop.plan import Plan, from_theirs, is_foreign, to_theirs
from memlm.models.modeling import MemLMForCausalLM

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Of the parameters of a state, which narrower numbers would falsify.
_WIDE = set(MemLMForCausalLM._keep_in_fp32_modules_strict)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a model; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _convert(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    written = sorted(name for name, one in ARCHITECTURES.items() if one.write_config is not None)
    parser = Parser(
        prog="python -m memlm.models.convert",
        description="Write another library's model as one of memlm, or one of memlm as another's.",
        epilog=f"model types that are read: {', '.join(sorted(ARCHITECTURES))}",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or a Hub id")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="new or empty")
    parser.add_argument(
        "--to",
        metavar="MODEL_TYPE",
        help=f"write a model of memlm as this one ({', '.join(written)})",
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="only tell what would be written"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--max_shard_size",
        "--max-shard-size",
        default="5GB",
        help="of a file with weights (default: %(default)s)",
    )
    parser.add_argument(
        "--allow_pickle",
        "--allow-pickle",
        action="store_true",
        help="read pickled weights, without running code that they may hold",
    )
    return parser


def _convert(options: argparse.Namespace) -> None:
    folder = options.folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{options.folder} is there and is not empty; name a new folder")
    hub = {} if options.revision is None else {"revision": options.revision}
    checkpoint = Checkpoint(options.source, options.allow_pickle, options.dry_run, **hub)
    plan = _plan(checkpoint, options.to)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if dtype is not None:
        _set_dtype(plan, dtype)
    files = _files(plan, dtype, options.max_shard_size)
    _print(plan, files)
    report = plan.conversion.report
    _print_report(report)
    if options.dry_run:
        report.check(checkpoint.source)
        print(f"dry run: nothing was written to {options.folder}")
        return
    plan.conversion.check()
    tokenizer = checkpoint.tokenizer_files()
    print(f"tokenizer: {', '.join(path.name for path in tokenizer) or 'no files of one'}")
    with tqdm(total=len(plan.conversion.targets), unit="tensor", disable=None) as bar:
        write_folder(
            folder, lambda path: _write(path, plan, files, tokenizer, bar), "convert again"
        )
    print(f"written to {options.folder}")


def _plan(checkpoint: Checkpoint, to: str | None) -> Plan:
    model_type = checkpoint.config["model_type"]
    if is_foreign(checkpoint.config):
        if to not in (None, MemLMConfig.model_type):
            raise UserError(
                f"{checkpoint.source} is a {model_type} model; --to {to} needs one of memlm: "
                "convert it to one first, without --to"
            )
        return from_theirs(checkpoint)
    if to in (None, MemLMConfig.model_type):
        raise UserError(
            f"{checkpoint.source} is a model of memlm already; --to says what it becomes"
        )
    return to_theirs(checkpoint, to)


def _set_dtype(plan: Plan, dtype: torch.dtype) -> None:
    if isinstance(plan.config, MemLMConfig):
        plan.config.dtype = dtype
    else:
        plan.config["dtype"] = str(dtype).removeprefix("torch.")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as it is written: numbers that must stay wide are never narrowed."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    if dtype.itemsize < 4 and _WIDE & set(name.split(".")):
        return tensor
    return tensor.to(dtype)


Files = list[tuple[str, dict[str, Tensor]]]


def _files(plan: Plan, dtype: torch.dtype | None, max_shard_size: str) -> Files:
    """The files of weights, and what each will hold (on the meta device)."""
    targets = plan.conversion.targets
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in targets.items()}
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"--max_shard_size: {error}") from error
    return [
        (file, {name: tensors[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    ]


def _write(folder: Path, plan: Plan, files: Files, tokenizer: list[Path], bar: tqdm) -> None:
    for file, expected in files:
        tensors = dict(_tensors(plan, expected, bar))
        save_file(tensors, folder / file, {"format": "pt"})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": _bytes(files)},
            "weight_map": {name: file for file, tensors in files for name in tensors},
        }
        _write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    if isinstance(plan.config, MemLMConfig):
        plan.config.save_pretrained(folder)
    else:
        _write_json(folder / CONFIG_NAME, plan.config)
    # Not save_pretrained, which refuses what published models have, such as top_p without sampling.
    plan.generation.to_json_file(folder / GENERATION_CONFIG_NAME)
    for path in tokenizer:
        shutil.copyfile(path, folder / path.name)


def _tensors(plan: Plan, expected: dict[str, Tensor], bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    for name, target in expected.items():
        yield name, plan.conversion.read(name).to(target.dtype)
        bar.update()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes(files: Files) -> int:
    return sum(tensor.nbytes for _, tensors in files for tensor in tensors.values())


def _print(plan: Plan, files: Files) -> None:
    """What is written."""
    config = plan.config
    if isinstance(config, MemLMConfig):
        own = MemLMConfig().to_dict().keys() - {"transformers_version", "model_type"}
        shown = {key: value for key, value in config.to_diff_dict().items() if key in own}
        shown["dtype"] = str(config.dtype).removeprefix("torch.")
    else:
        shown = config
    print(yaml.safe_dump({"model": shown}, sort_keys=False, default_flow_style=None).rstrip())
    targets = plan.conversion.targets.values()
    parameters = sum(tensor.numel() for tensor in targets)
    print(
        f"{count(targets, 'tensor')}, {parameters:,} parameters, {_bytes(files):,} bytes in "
        f"{count(files, 'file')}"
    )


def _print_report(report: Report) -> None:
    """Every tensor that is left out, or that stands in the way."""
    for kind in ("missing", "unused", "dropped"):
        for name in getattr(report, kind):
            print(f"{kind}: {name}")
    for name, (found, expected) in report.wrong.items():
        print(f"wrong shape: {name} is {found} instead of {expected}")


if __name__ == "__main__":
    sys.exit(main())
