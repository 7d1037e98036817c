"""The command: `python -m memlm.training.plan --config FILE --gpus 64 --gpu h200`."""

import argparse
import dataclasses
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import get_args

from torch import nn

from memlm.cli import Parser, run_entry_point
from memlm.config import RunConfig, load_config
from memlm.data import load_tokenizer
from memlm.errors import UserError
from memlm.models import MemLMConfig
from memlm.models.insert import freeze_base
from memlm.models.insert_config import InsertConfig
from memlm.models.retrofit import INSERT, retrofit_config
from memlm.training.plan import GPUS, Cluster, Plan, find_gpu, make_plan, report
from memlm.training.plan.weights import Parallel


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a run; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _print_plan(argv))


def _print_plan(argv: Sequence[str] | None) -> None:
    given, overrides = _parser().parse_known_args(argv)
    for name in ("gpus", "gpus_per_node", "document"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}: must be at least 1, got {getattr(given, name)}")
    cluster = Cluster(find_gpu(given.gpu), given.gpus, given.gpus_per_node)
    run = load_config(given.config, overrides, given.preset)
    options = run.train
    if given.length is not None:
        options = dataclasses.replace(options, curriculum=[], length=given.length)
    config, inserted = model_config(run, given.config)

    def prepare(model: nn.Module) -> None:
        if inserted is not None and inserted.freeze_base:
            freeze_base(model, inserted)

    def again(parallel: Parallel = given.parallel, **changes) -> Plan:
        changed = dataclasses.replace(options, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about kernels that are not run
            return make_plan(
                config, changed, cluster, parallel, document=given.document, prepare=prepare
            )

    logging.getLogger("torch").setLevel(logging.ERROR)
    plan = again()
    print(given.config)
    print("\n".join(report.lines(plan)), flush=True)
    if not plan.fits:
        print("\nWhat would need less:")
        for line in report.alternatives(plan, again):
            print(f"- {line}", flush=True)


def model_config(run: RunConfig, path: str) -> tuple[MemLMConfig, InsertConfig | None]:
    """The model of a run config, and what is inserted into it.

    Raises:
        UserError: for a memory that is attached to a pretrained model.
    """
    section = run.model
    if "attach" in section:
        raise UserError(f"{path}: only whole models are planned, not a memory beside another one")
    if "pretrained" in section:
        given = section.get("insert")
        inserted = None if given is None else InsertConfig.from_mapping(given, INSERT)
        return retrofit_config(section["pretrained"], inserted), inserted
    if "vocab_size" not in section:
        section = {"vocab_size": len(load_tokenizer(run.data.tokenizer))} | section
    return MemLMConfig.from_mapping(section), None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m memlm.training.plan",
        description="What a training run needs on given GPUs: memory, work, messages, time.",
        epilog="Any key of the config can be given, as in --train.activations recompute.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of a run")
    parser.add_argument("--preset", metavar="NAME", help="an entry of the file's presets")
    parser.add_argument("--gpus", type=int, default=8, help="all of them (default: 8)")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (default: h100)"
    )
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, metavar="N", help="of a machine (default: 8)"
    )
    parser.add_argument(
        "--parallel",
        choices=get_args(Parallel),
        default="fsdp2",
        help="how the weights are shared (default: fsdp2)",
    )
    parser.add_argument(
        "--length", type=int, metavar="TOKENS", help="of a row (default: the last stage's)"
    )
    parser.add_argument(
        "--document",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="of the documents in a row (default: 1024); full attention masks several of them",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
