"""Weight and temperature of an output memory: `python -m memlm.evaluation.tune_output`.

The text is read once: the model's distribution does not depend on the two, and what the memory
finds neither.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from memlm.cli import Parser, run_entry_point
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError, nearest
from memlm.evaluation.conditions import make_plan
from memlm.evaluation.haystack import held_out_corpus
from memlm.evaluation.loading import check_sizes, load_model
from memlm.evaluation.scoring import pad_documents, score_targets
from memlm.evaluation.subject import MemorySubject
from memlm.layers.context import CallContext
from memlm.layers.state import MemoryState
from memlm.memory.output_memory import OutputMemory
from memlm.models.attached import AttachedMixin

DESCRIPTION = """Choose weight and temperature of a model's output memory on validation text. What
the choice is worth has to be measured on other text, for example by eval.py: the number printed
here is the best of many on this text."""
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
# Times the temperature that the memory has.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Loss on validation text for every setting.

    Attributes:
        tokens: targets that were scored.
        found: the share of them for which the memory had an entry at all.
        base: nats per token without the memory.
        weights, temperatures: what was tried.
        nats: nats per token, one list per temperature with one number per weight.
    """

    tokens: int
    found: float
    base: float
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    nats: list[list[float]]

    @property
    def best(self) -> dict[str, float]:
        """The setting with the lowest loss and that loss; weight 0 if none is below the base's."""
        choices = [
            {"weight": weight, "temperature": temperature, "nats": self.nats[row][column]}
            for row, temperature in enumerate(self.temperatures)
            for column, weight in enumerate(self.weights)
        ]
        base = {"weight": 0.0, "temperature": self.temperatures[0], "nats": self.base}
        return min([base, *choices], key=lambda choice: choice["nats"])


class _Probe(nn.Module):
    """Stands in for an output memory: leaves the logits alone, and keeps log p_memory of targets.

    Attributes:
        log_p: per call, float64 [temperatures, B, T].
        found: per call, bool [B, T].
    """

    def __init__(self, memory: OutputMemory, temperatures: Sequence[float], targets: Tensor):
        super().__init__()
        self.memory, self.temperatures, self.targets = memory, temperatures, targets
        self.log_p: list[Tensor] = []
        self.found: list[Tensor] = []
        self._read = 0  # columns of the targets

    def init_state(self, *args: Any) -> MemoryState | None:
        return self.memory.init_state(*args)

    def forward(
        self,
        hidden: Tensor,
        logits: Tensor,
        state: MemoryState | None,
        context: CallContext,
        columns: Tensor,
    ) -> tuple[Tensor, MemoryState | None]:
        blocks, state = self.memory.read(hidden, state, context, columns)
        for evidence in blocks:
            start, self._read = self._read, self._read + evidence.tokens.shape[1]
            targets = self.targets[:, start : self._read]
            log_p = [evidence.log_probability(targets, value) for value in self.temperatures]
            self.log_p.append(torch.stack(log_p).double())
            self.found.append(evidence.found)
        return logits, state


@contextlib.contextmanager
def _in_place_of_memory(
    model: nn.Module, temperatures: Sequence[float], targets: Tensor
) -> Iterator[_Probe]:
    place, name = (
        (model.memory, "output") if isinstance(model, AttachedMixin) else (model, "output_memory")
    )
    memory = getattr(place, name)
    if memory is None:
        raise UserError("the model has no output memory; name one (--output)")
    probe = _Probe(memory, temperatures, targets)
    setattr(place, name, probe)
    try:
        yield probe
    finally:
        setattr(place, name, memory)


@torch.no_grad()
def tune(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    weights: Sequence[float] = WEIGHTS,
    temperatures: Sequence[float] | None = None,
    batch_size: int = 8,
    segment: int = 512,
) -> Tuning:
    """Score documents with every weight and temperature.

    Args:
        model: with an output memory, in evaluation mode.
        documents: token ids, two or more each.
        weights: at least 0 and below 1; 0 is always tried.
        temperatures: positive; None = the memory's own and a few around it.
        batch_size: documents that are read together.
        segment: tokens that are read at a time.

    Raises:
        UserError: for a model without output memory, or values that cannot work.
    """
    if temperatures is None:
        own = model.memories()["output"].config.temperature if "output" in model.memories() else 1.0
        temperatures = [factor * own for factor in FACTORS]
    _check(weights, temperatures)
    sums = torch.zeros(len(temperatures), len(weights), dtype=torch.float64)
    base = found = tokens = 0.0
    # Documents of one length together leave little padding.
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    subject = MemorySubject(model, None, make_plan(model), segment)
    bar = tqdm(total=sum(map(len, documents)) - len(documents), unit="tok", unit_scale=True)
    with bar:
        for first in range(0, len(order), batch_size):
            rows = [documents[index] for index in order[first : first + batch_size]]
            inputs, targets = pad_documents(rows)
            with _in_place_of_memory(model, temperatures, targets.to(model.device)) as probe:
                states, losses = None, []
                for tokens_read, wanted in zip(
                    inputs.split(segment, dim=1), targets.split(segment, dim=1), strict=True
                ):
                    loss, states = score_targets(subject, tokens_read, wanted, states)
                    losses.append(loss)
                    bar.update(int((wanted >= 0).sum()))
            scored = targets >= 0
            log_base = -torch.cat(losses, 1).double()[scored]  # [N]
            log_memory = torch.cat(probe.log_p, -1).cpu()[:, scored]  # [temperatures, N]
            hit = torch.cat(probe.found, -1).cpu()[scored]
            base -= float(log_base.sum())
            found += int(hit.sum())
            tokens += len(log_base)
            for column, weight in enumerate(weights):
                mixed = log_base.expand_as(log_memory)
                if weight > 0:
                    mixed = torch.logaddexp(
                        log_base + math.log1p(-weight), log_memory + math.log(weight)
                    )
                sums[:, column] -= torch.where(hit, mixed, log_base).sum(-1)
    return Tuning(
        tokens=int(tokens),
        found=found / tokens,
        base=base / tokens,
        weights=tuple(weights),
        temperatures=tuple(temperatures),
        nats=(sums / tokens).tolist(),
    )


def _check(weights: Sequence[float], temperatures: Sequence[float]) -> None:
    for weight in weights:
        if not 0 <= weight < 1:
            raise UserError(f"weights: {weight} must be at least 0 and below 1")
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise UserError(f"temperatures: {temperature} must be positive")
    if not weights or not temperatures:
        raise UserError("weights and temperatures: give at least one each")


def format_table(tuning: Tuning) -> str:
    """Nats per token by temperature (rows) and weight (columns); weight 0 is the model alone."""
    best = tuning.best
    rows = [["temperature", "0", *(f"{weight:g}" for weight in tuning.weights)]]
    for temperature, nats in zip(tuning.temperatures, tuning.nats, strict=True):
        numbers = [f"{value:.4f}{'*' if value == best['nats'] else ' '}" for value in nats]
        rows.append([f"{temperature:g}", f"{tuning.base:.4f} ", *numbers])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(0, "nats per token by weight:")
    lines.insert(2, "-" * max(map(len, lines)))
    gain = tuning.base - best["nats"]
    lines += [
        f"{tuning.tokens} tokens, {100 * tuning.found:.1f} % with an entry. Best: weight "
        f"{best['weight']:g}, temperature {best['temperature']:g}: {best['nats']:.4f} nats, "
        f"{gain:.4f} below the model alone.",
        "It is the best of many on this text: measure it on other text before it is reported.",
    ]
    limits = {"weight": (max(tuning.weights),)}
    limits["temperature"] = (min(tuning.temperatures), max(tuning.temperatures))
    edges = [name for name, values in limits.items() if best[name] in values]
    if edges and best["weight"] > 0:
        lines.append(f"At the edge of what was tried: the best {' and '.join(edges)}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune as the command line says; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _main(parse_arguments(sys.argv[1:] if argv is None else argv)))


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: for an unknown option (with the nearest one), or a missing or wrong value.
    """
    parser = Parser(
        prog="python -m memlm.evaluation.tune_output", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="run folder or Hub id")
    add(
        "--files",
        nargs="+",
        default=[],
        help="validation text; default: held-out sources of the standard library",
    )
    add("--out", required=True, type=Path, help="JSON file for the results")
    add(
        "--output",
        type=_entry,
        help="the output memory, a name or {type: NAME, ...}; default: the model's own",
    )
    add("--tokenizer", help="default: the one beside the model")
    add("--weights", type=_numbers, default=WEIGHTS, help="such as 0.05,0.1,0.2")
    add("--temperatures", type=_numbers, help="default: the memory's own and a few around it")
    add("--documents", type=_count, default=32, help="documents that are read, from the first (32)")
    add("--length", type=_count, default=4096, help="tokens that are read of each, at most (4096)")
    add("--batch-size", type=_count, default=8, help="documents that are read together (8)")
    options, unknown = parser.parse_known_args(list(words))
    if unknown:
        hint = nearest(unknown[0], parser._option_string_actions)
        raise UserError(f"unknown option {unknown[0]}{hint}")
    return options


def _entry(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        message = f"{text!r} is not numbers with commas between them"
        raise argparse.ArgumentTypeError(message) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _main(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise UserError(f"--out: {options.out} exists already")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # now, not when all is read
        raise UserError(f"--out: {options.out} cannot be written ({error.strerror})") from error
    model = load_model(options.model)
    attached = isinstance(model, AttachedMixin)
    if not hasattr(model, "memories"):
        raise UserError(
            f"--model: {options.model} has no place for an output memory; attach one and save it"
        )
    if options.output is not None:
        if attached:
            raise UserError("--output: this model was saved with what is attached to it; leave it")
        model.set_output_memory(options.output)
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    check_sizes(model, tokenizer)
    corpus = held_out_corpus(tokenizer, options.files)
    documents = [
        corpus.tokens[corpus.starts[index] :][: min(corpus.lengths[index], options.length)]
        for index in np.flatnonzero(corpus.lengths > 1)[: options.documents]
    ]
    if not documents:
        raise UserError("--files: no document has two tokens")
    if torch.cuda.is_available():
        model = model.to("cuda")
    tuning = tune(model, documents, options.weights, options.temperatures, options.batch_size)
    print(format_table(tuning))
    result = {
        "model": options.model,
        "output": model.attachment.config.output if attached else model.config.output,
        "files": options.files,
        "documents": len(documents),
        "length": options.length,
        **dataclasses.asdict(tuning),
        "best": tuning.best,
    }
    unfinished = options.out.with_name(options.out.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(options.out)


if __name__ == "__main__":
    sys.exit(main())
